"""The prepare stage: raw text to a tokenizer and token shards, with a manifest of what was read, kept and dropped.
Reading, training, encoding and storing are in `trainer.data`; here they are put in order and reported."""

import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainer.__main__ import stage_main
from trainer.artifact import hash_tree, staging, versions, write_artifact, write_json
from trainer.config import Prepare, Recipe
from trainer.data.corpus import SPLITS, Corpus, collect
from trainer.data.encoding import write_shards
from trainer.data.files import hash_tokenizer
from trainer.data.journal import Journal
from trainer.data.shards import MANIFEST_FILE
from trainer.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from trainer.environment import launch_command
from trainer.errors import UserError
from trainer.recipe_file import recipe_hash, require_section

_MIB = 2**20
_CODE = 1  # raised whenever the same text would give other shards: work of an older code is not gone on with


def run(recipe: Recipe) -> None:
    """Write `recipe.tokenizer_dir` and `recipe.data_dir`, each whole or as it was before.

    The same recipe and data give the same bytes, also where a run was interrupted: the next one goes on after the last
    file that was read, and the last shard that was written. This is the work of one process: under a launcher
    (WORLD_SIZE > 1) rank 0 does it, and the others return at once without waiting for it.
    """
    require_section(recipe, "prepare")
    assert recipe.prepare is not None
    if recipe.prepare_dir is not None:
        raise UserError(
            f"prepare_dir is {recipe.prepare_dir}: this run takes the data of another one",
            "no prepare_dir where prepare runs",
            "leave it out, or leave this stage out",
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0":
        return
    work = recipe.data_dir.with_name("unfinished")
    # The two renames follow each other at once; TokenShards.require_tokenizer notices a crash between them.
    with staging(recipe.data_dir) as data, staging(recipe.tokenizer_dir) as tokenizer, _progress() as progress:
        manifest = _prepare(recipe.prepare, work, data, tokenizer, progress)
    shutil.rmtree(work)
    _print_report(manifest, recipe)


def _prepare(prepare: Prepare, work: Path, data: Path, tokenizer_dir: Path, progress: Progress) -> dict[str, Any]:
    """All of the work below `work`, which an interrupted run leaves for the next one; then into the two folders."""
    recipe_sha256, made_from = recipe_hash(prepare), {}
    if prepare.tokenizer.path is not None:
        load_tokenizer(prepare.tokenizer)  # a mistake is said before hours of reading
        made_from = {"loaded_from": hash_tokenizer(prepare.tokenizer.path)}
    begun_by = {"code": _CODE, "python": platform.python_version(), **versions()}
    journal = Journal(work, {"recipe": recipe_sha256, **made_from, **begun_by})
    if left := journal.left():
        had = ", ".join(f"{number:,} {kind}{'s' * (number > 1)}" for kind, number in left.items())
        print(f"going on with an interrupted run; it had finished {had}", flush=True)
    corpus = collect(prepare, work / "spool", journal, _task(progress, "reading files"))
    tokenizer = _tokenizer(prepare, corpus, work / "tokenizer", journal, progress)
    counted = write_shards(prepare, corpus, tokenizer, work / "shards", journal, _task(progress, "encoding documents"))
    shutil.copytree(work / "tokenizer", tokenizer_dir, dirs_exist_ok=True)
    for split in SPLITS:
        shutil.copytree(work / "shards" / split, data / split, copy_function=_link)
    tokenizer_sha256 = hash_tree(tokenizer_dir)
    manifest = {"format": "megatron-indexed", "tokenizer_sha256": tokenizer_sha256, **counted}
    write_json(data / MANIFEST_FILE, manifest)
    write_artifact(
        tokenizer_dir,
        "tokenizer",
        recipe_sha256=recipe_sha256,
        parents=made_from,
        evidence=[{"what": "tokenizer", "metrics": manifest["tokenizer"], "command": launch_command()}],
        about={"vocab_size": len(tokenizer)},
    )
    write_artifact(data, "token_shards", recipe_sha256=recipe_sha256, parents={"tokenizer": tokenizer_sha256})
    return manifest


def _link(source: str, target: str) -> None:
    """A second name for a file, so that a stop before all is on disk loses nothing; a copy where there are no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _tokenizer(
    prepare: Prepare, corpus: Corpus, folder: Path, journal: Journal, progress: Progress
) -> PreTrainedTokenizerFast:
    """The tokenizer, saved in `folder`: taken over from an interrupted run, loaded, or trained."""
    config = prepare.tokenizer
    state = journal.recall("tokenizer", config.type)
    if state is not None:
        if folder.is_dir() and hash_tree(folder) == state["sha256"]:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        journal.forget(1)
    if config.path is not None:
        tokenizer = load_tokenizer(config)
    else:
        task = progress.add_task(f"training {config.type} tokenizer", total=1)
        tokenizer = train_tokenizer(config, lambda: corpus.training_texts(int(config.max_training_mib * _MIB)))
        progress.update(task, completed=1)
    shutil.rmtree(folder, ignore_errors=True)
    save_tokenizer(tokenizer, folder)
    journal.note("tokenizer", config.type, {"sha256": hash_tree(folder)})
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)  # as a run that takes it over


def _progress() -> Progress:
    """A display on standard error; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _task(progress: Progress, description: str) -> Callable[[int, int], None]:
    task = progress.add_task(description, total=None, visible=False)
    return lambda done, total: progress.update(task, completed=done, total=total, visible=True)


def _print_report(manifest: dict[str, Any], recipe: Recipe) -> None:
    console = Console()
    for table in (_sources_table(manifest), _splits_table(manifest)):
        console.print(table)
    quality = manifest["tokenizer"]
    console.print(
        f"tokenizer: {manifest['vocab_size']:,} entries; on validation text {quality['fertility_tokens_per_word']:.2f} "
        f"tokens a word, {quality['bytes_per_token']:.2f} bytes a token, {quality['unknown_rate']:.2%} unknown"
    )
    console.print(f"wrote {recipe.tokenizer_dir} and {recipe.data_dir}", soft_wrap=True)


def _sources_table(manifest: dict[str, Any]) -> Table:
    table = Table("source", "files", "read", "kept", "dropped")
    for source in manifest["sources"]:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in source["dropped"].items())
        counts = [f"{source[key]:,}" for key in ("files", "documents_read", "documents_kept")]
        table.add_row(source["name"], *counts, reasons or "none")
    return table


def _splits_table(manifest: dict[str, Any]) -> Table:
    table = Table("split", "documents", "characters", "tokens", "shards")
    for name, split in manifest["splits"].items():
        counts = [f"{split[key]:,}" for key in ("documents", "characters", "tokens")]
        table.add_row(name, *counts, str(len(split["shards"])))
    return table


if __name__ == "__main__":
    stage_main("prepare")

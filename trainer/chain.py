"""The `run` verb: all stages of a recipe in order, leaving out those whose recipe and inputs did not change.
It knows the order of the stages and nothing of what they do; nothing heavy is imported, so that a dry run can ask."""

import hashlib
import importlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from trainer.artifact import (
    ARTIFACT_FILE,
    alone_in,
    content_hash,
    free_name,
    hash_file,
    read_artifact,
    versions,
    write_json,
)
from trainer.config import Prepare, Recipe, Training, deciding_settings
from trainer.data.files import find_files, hash_tokenizer, stamp
from trainer.errors import OtherRun, UserError
from trainer.export_config import Export

# Stage, its module, what it leaves behind, the stages whose results it reads.
STAGES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "prepare": ("trainer.prepare", ("prepare/data", "prepare/tokenizer"), ()),
    "pretrain": ("trainer.pretrain", ("pretrain/model",), ("prepare",)),
    "distill": ("trainer.distill", ("distill/model",), ("prepare", "pretrain")),
    "export": ("export.export", ("export",), ("prepare", "pretrain", "distill")),
    "bench": ("export.bench", ("bench",), ("prepare", "pretrain", "distill", "export")),
    "tensorrt": ("export.to_tensorrt", ("tensorrt",), ("export",)),
    "pack": ("export.pack", ("pack",), ("export", "tensorrt")),
}


def run(recipe: Recipe) -> None:
    """Run the chain, then the report. A stage is skipped if nothing that it depends on changed since it finished."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "`lmworks run` was started as several ranks",
            "one process for the chain",
            "launch a training stage by itself: accelerate launch -m trainer.pretrain RECIPE",
        )
    console = Console(stderr=True, highlight=False)
    record = _read(recipe)
    for stage in _asked(recipe):
        if due(recipe, stage, record.get(stage)):
            console.rule(stage)
            began = time.perf_counter()
            with alone_in(recipe.stage_dir(stage)):
                key = stage_key(recipe, stage)
                _run_stage(recipe, stage, console)
            seconds = round(time.perf_counter() - began, 3)
            record[stage] = {"made_from": key, "outputs": outputs(recipe, stage), "seconds": seconds, "skipped": False}
        else:
            console.print(f"{stage}: up to date")
            record[stage]["skipped"] = True
        write_json(recipe.run_dir / "chain.json", {"stages": record})
    importlib.import_module("export.report").run(recipe)


def preview(recipe: Recipe) -> Iterator[str]:
    """What `run` would do, a line for each stage, and why."""
    record = _read(recipe)
    before: list[str] = []
    for stage in _asked(recipe):
        first = [parent for parent in STAGES[stage][2] if parent in before]
        try:
            reason = due(recipe, stage, record.get(stage))
        except UserError as error:
            yield f"{stage}: would stop: {error}".replace("\n", "; ")
            return
        if reason:
            yield f"{stage}: would run: {reason}{_left_off(recipe, stage)}"
        elif first:
            yield f"{stage}: would run if {first[-1]} gives another result than before"
        else:
            yield f"{stage}: up to date"
            continue
        before.append(stage)
    yield "report: would run"


def _left_off(recipe: Recipe, stage: str) -> str:
    """That a stage has checkpoints: whether they are of this very run is known only when it opens them."""
    checkpoints = recipe.stage_dir(stage) / "checkpoints"
    if not any(checkpoints.glob("step-*")):
        return ""
    return f"; it goes on from {checkpoints}, or sets them aside and begins at step 0 where they are another recipe's"


def due(recipe: Recipe, stage: str, entry: dict[str, Any] | None) -> str:
    """Why a stage must run; nothing if it finished, and what it left is what its recipe and its inputs make now.

    `entry` is what the chain noted when the stage finished. UserError if an input cannot be found.
    """
    key = stage_key(recipe, stage)
    if entry is None or "made_from" not in entry:
        return "`lmworks run` has not finished it here"
    changed = [part for part in key if entry["made_from"].get(part) != key[part]]
    if changed:
        return f"other {', '.join(changed)} than before"
    left = outputs(recipe, stage)
    missing = [folder for folder, hashes in left.items() if not hashes]
    if missing:
        return f"{', '.join(missing)} is not there"
    replaced = [folder for folder, hashes in left.items() if hashes != entry["outputs"].get(folder)]
    return f"{', '.join(replaced)} is not what the chain left there" if replaced else ""


def stage_key(recipe: Recipe, stage: str) -> dict[str, str]:
    """Hashes of all that a stage's result depends on: its section and the seed, its inputs' contents, versions."""
    section = getattr(recipe, stage)
    settings = deciding_settings(section) if isinstance(section, Training) else section.model_dump(mode="json")
    if stage == "distill" and recipe.pretrain is not None:
        settings["inherited"] = recipe.pretrain.model_dump(mode="json", include={"objective", "data"})
    inputs: list[Any] = [_content(path) for above in STAGES[stage][2] for path in _left_by(recipe, above).values()]
    inputs += [[content_hash(folder)] for folder in _named_folders(recipe, stage) if folder.is_dir()]
    inputs += _text(section) if isinstance(section, Prepare) else []
    labelled = section.quality.labelled if isinstance(section, Export) and section.quality else None
    inputs += [hash_file(labelled)] if labelled is not None and labelled.is_file() else []
    return {"recipe": _sha256([settings, recipe.seed]), "inputs": _sha256(inputs), "versions": _sha256(versions())}


def outputs(recipe: Recipe, stage: str) -> dict[str, list[str]]:
    """Content hashes of what a stage leaves, by folder; an empty list where it left nothing."""
    return {folder: _content(path) for folder, path in _left_by(recipe, stage).items()}


def _left_by(recipe: Recipe, stage: str) -> dict[str, Path]:
    """The folders of a stage's results, by the names of `STAGES`."""
    if stage == "prepare":  # of another run, perhaps
        return dict(zip(STAGES[stage][1], (recipe.data_dir, recipe.tokenizer_dir), strict=True))
    return {folder: recipe.run_dir / folder for folder in STAGES[stage][1]}


def _run_stage(recipe: Recipe, stage: str, console: Console) -> None:
    module = importlib.import_module(STAGES[stage][0])
    refusal = _refused_checkpoints(module, recipe)
    if refusal:
        checkpoints = recipe.stage_dir(stage) / "checkpoints"
        kept = free_name(checkpoints.with_name("checkpoints-aside"))
        checkpoints.rename(kept)
        console.print(f"{refusal}\nkept as {kept}; {stage} begins at step 0", markup=False, soft_wrap=True)
        module.run(recipe)


def _refused_checkpoints(module: ModuleType, recipe: Recipe) -> str:
    """Run a stage; why it will not go on from the checkpoints that are there, or nothing if it finished."""
    try:
        module.run(recipe)
    except OtherRun as error:
        return str(error).split("\nNeeded:")[0]
    return ""


def _asked(recipe: Recipe) -> list[str]:
    taken = {"prepare"} if recipe.prepare_dir is not None else set()
    return [stage for stage in STAGES if getattr(recipe, stage) is not None and stage not in taken]


def _text(prepare: Prepare) -> list[Any]:
    """What prepare reads: a stamp of each file, the tokenizer that it loads, and whose standard library it is."""
    files = [[stamp(path) for path in find_files(source)] for source in prepare.sources]
    given = prepare.tokenizer.path
    tokenizer = hash_tokenizer(given) if given is not None and given.exists() else None
    python = platform.python_version() if any(source.type == "stdlib" for source in prepare.sources) else None
    return [files, tokenizer, python]


def _named_folders(recipe: Recipe, stage: str) -> list[Path]:
    """Model folders that the recipe itself names, instead of taking an earlier stage's."""
    if stage == "pretrain" and recipe.pretrain and recipe.pretrain.model.init_from:
        return [recipe.pretrain.model.init_from]
    if stage == "distill" and recipe.distill and recipe.distill.teacher:
        return [recipe.distill.teacher]
    return list(recipe.exported_models().values()) if stage in ("export", "bench") else []


def _content(folder: Path) -> list[str]:
    """Content hashes of the artifacts at `folder` or right below it, and of a report there; none where nothing is."""
    places = [path.parent for path in (folder / ARTIFACT_FILE, *sorted(folder.glob(f"*/{ARTIFACT_FILE}")))]
    hashes = [read_artifact(place)["content_sha256"] for place in places if (place / ARTIFACT_FILE).is_file()]
    return [*hashes, *(hash_file(path) for path in folder.glob("report.json"))]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(recipe: Recipe) -> dict[str, Any]:
    path = recipe.run_dir / "chain.json"
    return json.loads(path.read_text())["stages"] if path.is_file() else {}

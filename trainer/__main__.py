"""The `lmworks` command: a table of verbs, each imported only when it is chosen.
Every verb's work is in its own module; here are only arguments, exit codes and the one-message rule for errors."""

import argparse
import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from trainer.artifact import alone_in
from trainer.config import Recipe
from trainer.engine.launch import ensure_ranks, leave
from trainer.errors import DISK_FULL, EXIT_DISK_FULL, EXIT_INTERRUPTED, Preempted, UserError
from trainer.recipe_file import dump_recipe, load_recipe, require_section


@dataclass(frozen=True)
class Verb:
    module: str
    does: str
    takes_recipe: bool = True
    flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # option -> what argparse is told about it
    what: tuple[str, ...] = ()  # a word before the recipe, one of these
    takes_stages: bool = False  # words after the recipe that are no key=value; then `--dry-run` is the verb's own
    folder: str = ""  # name of a folder argument, in place of a recipe
    words: str = ""  # name of what may stand after that folder
    elsewhere: Mapping[str, str] = field(default_factory=dict)  # such a word -> the module that does it


_FOLDERS = {
    "packed": "a folder that pack wrote",
    "run_dir": "the recipe's run_dir",
    "folder": "an exported model, its engines, or a model folder of transformers",
}
_WORDS = {"prompts": "texts to go on from; without any, the lines of standard input"}
GPU_NAMES = ("a100-40", "a100-80", "h100", "h200", "b200", "l40s", "rtx4090", "v100")  # planning.hardware's
_FORMS = ("fp32", "fp32_fused", "fp16", "bf16", "int8", "int8_static", "int4", "fp8")  # export_config's Precision
VERBS = {
    "run": Verb("trainer.chain", "run the whole chain of a recipe, skipping stages that are up to date"),
    "plan": Verb(
        "trainer.plan",
        "memory a GPU, time and communication of each training stage, before anything runs",
        flags={
            "--gpus": {"type": int, "default": 1, "metavar": "N", "help": "GPUs in all, eight a node (default 1)"},
            "--gpu": {"choices": GPU_NAMES, "default": "h100", "help": "type of GPU (default h100)"},
            "--mfu": {"type": float, "default": 0.4, "help": "share of the peak that is reached (default 0.4)"},
            "--probe": {"action": "store_true", "help": "run a step here on random tokens, and compare"},
            "--json": {"type": Path, "metavar": "FILE", "help": "write the numbers to FILE too"},
        },
    ),
    "prepare": Verb("trainer.prepare", "raw text to tokenizer and token shards"),
    "pretrain": Verb("trainer.pretrain", "token shards to a language model"),
    "distill": Verb("trainer.distill", "a large model to a small one"),
    "verify": Verb(
        "trainer.verify",
        "prove on this recipe and these ranks that a resumed run equals an unbroken one, gradients plain fp32's, or "
        "exported models their sources",
        flags={"--bisect": {"action": "store_true", "help": "export: name the first node at which a form departs"}},
        what=("resume", "gradients", "export"),
        elsewhere={"export": "export.verify"},
    ),
    "export": Verb("export.export", "model folders to verified ONNX"),
    "bench": Verb("export.bench", "latency, throughput, memory and quality of every backend"),
    "tensorrt": Verb("export.to_tensorrt", "verified exports to TensorRT engines whose precision is read back"),
    "pack": Verb("export.pack", "verified exports to a model repository that Triton serves, text in and answer out"),
    "serve": Verb(
        "export.serve",
        "a packed model in a real Triton server on this machine's CPU",
        takes_recipe=False,
        folder="packed",
        flags={
            "--address": {"default": "127.0.0.1", "help": "address to listen on (default 127.0.0.1)"},
            "--http-port": {"type": int, "default": 8000, "metavar": "PORT", "help": "default 8000"},
            "--grpc-port": {"type": int, "default": 8001, "metavar": "PORT", "help": "default 8001"},
            "--metrics-port": {"type": int, "default": 8002, "metavar": "PORT", "help": "default 8002"},
            "--environment": {
                "type": Path,
                "metavar": "FOLDER",
                "help": "where the server is installed, once (default ~/.cache/lmworks/triton)",
            },
        },
    ),
    "generate": Verb(
        "export.prompts",
        "text that an exported causal model writes after a prompt, as it comes",
        takes_recipe=False,
        folder="folder",
        words="prompts",
        flags={
            "--variant": {"choices": _FORMS, "help": "which exported form (default fp32 where it was exported)"},
            "--max-new-tokens": {"type": int, "default": 64, "metavar": "N", "help": "default 64"},
            "--temperature": {"type": float, "default": 0.0, "metavar": "T", "help": "default 0: the likeliest token"},
            "--top-k": {"type": int, "default": 0, "metavar": "K", "help": "of the K likeliest (default 0: of all)"},
            "--top-p": {"type": float, "default": 1.0, "metavar": "P", "help": "of the fewest with this probability"},
            "--seed": {"type": int, "default": 0, "metavar": "N", "help": "for temperatures above 0 (default 0)"},
            "--stop": {
                "action": "append",
                "default": [],
                "metavar": "STRING",
                "help": "end before it; may be repeated",
            },
            "--json-lines": {
                "action": "store_true",
                "help": "an object of JSON for each prompt, when its text is whole",
            },
        },
    ),
    "report": Verb("export.report", "report.html, plots and model cards from what was measured"),
    "submit": Verb(
        "slurm.submit",
        "the chain, or some stages of it, as jobs of a SLURM cluster",
        takes_stages=True,
        flags={
            "--site": {"default": "plain", "metavar": "FILE", "help": "names and ways of the cluster (default plain)"},
            "--array": {
                "action": "append",
                "default": [],
                "metavar": "key=value,value",
                "help": "a job array over these values; several make a grid",
            },
        },
    ),
    "status": Verb("slurm.status", "the jobs of a run folder", takes_recipe=False, folder="run_dir"),
    "cancel": Verb("slurm.cancel", "end the jobs of a run folder", takes_recipe=False, folder="run_dir"),
    "doctor": Verb("trainer.doctor", "what this machine has, and what it is usable for", takes_recipe=False),
    "schema": Verb("trainer.schema", "the recipe's JSON Schema, for editors", takes_recipe=False),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code: 0 success, 1 failed gate, 2 user's error, 75 preempted."""
    arguments = _parse(argv)
    verb = VERBS[arguments.verb]
    try:
        _end_on_sigterm()
        if not verb.takes_recipe:
            given = {name: getattr(arguments, name) for name in (verb.folder, verb.words) if name}
            importlib.import_module(verb.module).run(**given, **_flags(verb, arguments))
        elif verb.takes_stages:
            stages = [word for word in arguments.overrides if "=" not in word]
            recipe = load_recipe(arguments.recipe, [word for word in arguments.overrides if "=" in word])
            flags = _flags(verb, arguments)
            importlib.import_module(verb.module).run(recipe, stages=stages, dry_run=arguments.dry_run, **flags)
        elif arguments.dry_run:
            recipe = load_recipe(arguments.recipe, arguments.overrides)
            print(dump_recipe(recipe), end="")
            for line in _would(arguments.verb, recipe):
                print(f"# {line}")
        else:
            what = {"what": arguments.what} if verb.what else {}
            recipe = load_recipe(arguments.recipe, arguments.overrides)
            module = verb.elsewhere.get(what.get("what", ""), verb.module)
            with _claimed(arguments.verb, recipe):
                importlib.import_module(module).run(recipe, **what, **_flags(verb, arguments))
    except UserError as error:
        print(f"lmworks {arguments.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except Preempted as stop:
        print(f"lmworks {arguments.verb}: {stop}", file=sys.stderr)
        return stop.exit_code
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"lmworks {arguments.verb}: {where}{error.strerror}\nDo: make room, and run the same command again; what "
              "was finished before is kept", file=sys.stderr)  # fmt: skip
        return EXIT_DISK_FULL
    except KeyboardInterrupt:  # stages that train answer it themselves and save
        print(f"lmworks {arguments.verb}: interrupted; run the same command to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _end_on_sigterm() -> None:
    """SIGTERM ends a verb as an error does, so that it ends what it started; stages that train answer it themselves."""
    here = threading.current_thread() is threading.main_thread()  # elsewhere no handler may be set
    if here and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminated)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise Preempted("stopped by SIGTERM; run the same command to go on")


def stage_main(verb: str) -> None:
    """Entry of `python -m trainer.<verb>` and `accelerate launch -m trainer.<verb>`."""
    ensure_ranks()
    leave(main([verb, *sys.argv[1:]]))


def _flags(verb: Verb, arguments: argparse.Namespace) -> dict[str, Any]:
    names = [flag.lstrip("-").replace("-", "_") for flag in verb.flags]
    return {name: getattr(arguments, name) for name in names}


def _would(verb: str, recipe: Recipe) -> Iterator[str]:
    """What a verb would do with the recipe; UserError where it would refuse it at once."""
    for stage in ("pretrain", "distill"):
        section = getattr(recipe, stage)
        if verb in (stage, "run") and section is not None and section.engine.zero is not None:
            importlib.import_module("trainer.engine.zero").load_zero(section.engine.zero)
    if verb == "run":
        yield from importlib.import_module("trainer.chain").preview(recipe)
        return
    if _is_stage(verb):
        require_section(recipe, verb)
    yield f"would: {VERBS[verb].does}; run folder {recipe.run_dir}"


def _claimed(verb: str, recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    """A stage has its folder to itself; the chain claims those of its stages one by one."""
    if not _is_stage(verb):
        return contextlib.nullcontext()
    require_section(recipe, verb)
    return alone_in(recipe.stage_dir(verb))


def _is_stage(verb: str) -> bool:
    return verb in Recipe.model_fields


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with words that stand after an option (argparse gives up on them) as if before it."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    strange = [word for word in rest if word.startswith("-")]
    free = "overrides" if hasattr(arguments, "overrides") else VERBS[arguments.verb].words
    if strange or (rest and not free):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if rest:
        setattr(arguments, free, [*getattr(arguments, free), *rest])
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lmworks", description="Raw text in, a compact served language model out.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        command = commands.add_parser(name, help=verb.does, description=verb.does)
        if verb.folder:
            command.add_argument(verb.folder, type=Path, metavar=verb.folder.upper(), help=_FOLDERS[verb.folder])
        if verb.words:
            command.add_argument(verb.words, nargs="*", metavar="PROMPT", help=_WORDS[verb.words])
        if verb.takes_recipe:
            if verb.what:
                command.add_argument("what", choices=verb.what, help="what is proven")
            command.add_argument("recipe", help="a YAML file, or the name of a recipe that ships with lmworks")
            stages = "stage or " if verb.takes_stages else ""
            command.add_argument(
                "overrides", nargs="*", metavar=f"{stages}key=value", help="such as pretrain.max_steps=100"
            )
            command.add_argument(
                "--dry-run", action="store_true", help="print the resolved recipe and what would happen"
            )
        for flag, told in verb.flags.items():
            command.add_argument(flag, **told)
    return parser


def _version() -> str:
    """Of what is installed; a copy of the code alone, as jobs have it, runs without."""
    try:
        return metadata.version("lmworks")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    ensure_ranks()
    leave(main())

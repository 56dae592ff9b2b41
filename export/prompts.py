"""The generate verb: prompts from the command line or standard input, and what a model writes after them, as it comes.
It opens only what is proven, forms that passed the parity gate or the model folder itself; the text is `texts`' work.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from export.generate import Sampling
from export.io_spec import IoSpec, read_spec
from export.runners import Pair, Runner, open_onnx_graphs, open_runner, usable_threads
from export.texts import not_done, stream_texts, with_end
from export.verified import examine
from trainer.artifact import ARTIFACT_FILE, read_artifact
from trainer.errors import UserError
from trainer.export_config import ENGINES, Backend


@dataclass(frozen=True)
class Writer:
    """A model that writes, opened. `folder` has its tokenizer, and says what ends its texts."""

    folder: Path
    runner: Runner | Pair
    spec: IoSpec
    tokenizer: Any


def run(
    folder: Path,
    prompts: Sequence[str] = (),
    variant: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    json_lines: bool = False,
) -> None:
    """Write on after each prompt, to standard output; without any, after each line of standard input that has text.

    Raises UserError for a folder, form, prompt or setting that will not do, and GateFailed for a file that is not the
    one that passed the gate.
    """
    asked = Sampling(max_new_tokens, temperature, top_k, top_p, seed=seed)  # refuses before a model is opened
    writer = open_writer(folder, variant)
    settings = with_end(asked, writer.folder)
    if lacking := not_done(writer.folder):
        _tell(f"{folder} asks for {', '.join(lacking)}, which is not done here: transformers' own text may be another")
    try:
        for prompt in prompts or _lines():
            _write(writer, prompt, settings, stop, json_lines)
    except BrokenPipeError:  # the reader has seen enough, as `head` does; Python would complain again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_writer(folder: Path, variant: str | None = None) -> Writer:
    """A model folder in PyTorch, or a verified form of an exported one: `variant`, or by itself fp32. In ONNX Runtime,
    or on a GPU, where the folder is the one of its engines.

    Refused as `verified.examine` and the loader of engines do; UserError where there is no such form.
    """
    from transformers import AutoTokenizer

    if any(folder.glob("*.safetensors")):
        if variant:
            raise UserError(
                f"{folder} is a model folder, which has no {variant}", "an exported folder", "export it, or leave the "
                "variant out: then it runs in PyTorch"
            )  # fmt: skip
        spec = read_spec(folder)
        runner = open_runner(folder, "eager", usable_threads(), spec=spec)
        _tell(f"{folder} in PyTorch, fp32")
    else:
        engines = _is_engines(folder)
        exported = folder.absolute().parents[1] / "export" / folder.absolute().name if engines else folder
        subject = examine(exported.name, exported)
        names = list(subject.variants)
        chosen = variant or ("fp32" if "fp32" in names else names[0])
        if chosen not in names:
            raise UserError(
                f"{exported} has no verified {chosen}", f"one of {', '.join(names)}", "export that variant too"
            )
        form, spec, folder = subject.variants[chosen], subject.spec, exported
        if engines:
            runner = open_runner(exported, _engine(chosen), usable_threads())
        else:
            runner = open_onnx_graphs(form.files, spec, usable_threads())
        what = f"an engine of {form.file}" if engines else str(form.file)
        _tell(f"{what}, which passed parity" + ("" if variant else f"; also: {names}"))
    return Writer(folder, runner, spec, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def _is_engines(folder: Path) -> bool:
    return (folder / ARTIFACT_FILE).is_file() and read_artifact(folder)["kind"] == "engines"


def _engine(variant: str) -> Backend:
    """The backend of a variant's engines; UserError for one of which none are built."""
    found = {name: backend for backend, name in ENGINES.items()}
    if variant not in found:
        raise UserError(f"no engines of {variant}", f"one of {', '.join(found)}", "give it by --variant")
    return cast(Backend, found[variant])


def _write(writer: Writer, prompt: str, settings: Sampling, stops: Sequence[str], json_lines: bool) -> None:
    """Put out one text, as it grows or as an object of JSON when it is whole."""
    shown, text = 0, None
    for (text,) in stream_texts(writer.runner, writer.spec, writer.tokenizer, [prompt], settings, stops):
        if not json_lines:
            print(text.text[shown:], end="", flush=True)
            shown = len(text.text)
    assert text is not None
    about = {
        "prompt": prompt,
        "text": text.text,
        "tokens": len(text.tokens),
        "ended_by": text.ended_by or "max_new_tokens",
    }
    print(json.dumps(about, ensure_ascii=False) if json_lines else "", flush=True)


def _lines() -> Iterator[str]:
    """The lines of standard input that hold more than blanks."""
    if sys.stdin.isatty():
        _tell("a prompt a line; Ctrl-D ends")
    try:
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is no text: {error}", "UTF-8", "convert it") from None


def _tell(what: str) -> None:
    """Standard output is the text's alone."""
    print(f"lmworks generate: {what}", file=sys.stderr, flush=True)

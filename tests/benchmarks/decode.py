"""How fast a GPT-2 of 124M parameters generates on the CPU from its exported forms, against transformers' `generate` in
fp32. Run by hand: python tests/benchmarks/decode.py [--out results.json]; no test depends on its figures.

Weights are random: speed does not depend on them, and quality is not measured. Prompts are Python's standard library.
As in inference.py, every variant lives in a process of its own and all take their windows in turn, round after round; a
round's ratio is against transformers in the same round. A window generates again and again, first one token (the time
to it) and then all; tokens_per_s is of those after the first.
"""

import argparse
import contextlib
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from inference import LOOSE, THREADS, train_tokenizer

from export.bench import describe_machine
from export.cases import stdlib_documents, tokens
from export.export import export_model
from export.generate import Sampling, generate
from export.io_spec import read_spec
from export.parity import holds_under
from export.runners import open_runner
from export.windows import MIN_CPU_SHARE, Settings, SystemClock, Window, take_window
from trainer.artifact import read_artifact, versions, write_json
from trainer.config import Recipe
from trainer.export_config import Export, Int4Tolerance, Parity

BATCH, NEW = 1, 33
PROMPTS = {"rows": 32, "rows_long": 900}
ROUNDS, MOST_ROUNDS, WINDOW_S = 6, 40, 1.0
VOCABULARY = 30_522  # of the text; the model's own is 50,257
SHIPPED = Parity()
PARITY = LOOSE.model_copy(update={"int4": Int4Tolerance(relative_rms=0.5, min_top1=0.0)})
VARIANTS = ("transformers", "onnx_fp32", "onnx_fp32_fused", "onnx_int8", "onnx_int4")


@dataclass(frozen=True)
class Turn:
    """What a variant did in one round: generating one token, and generating all."""

    first: Window
    whole: Window

    @property
    def counts(self) -> bool:
        return min(self.first.cpu_share, self.whole.cpu_share) >= MIN_CPU_SHARE

    @property
    def tokens_per_s(self) -> float:
        return BATCH * (NEW - 1) / (self.whole.median_s - self.first.median_s)


def main() -> None:
    """Build, export, measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = build_model(Path(scratch) / "model")
        documents = stdlib_documents(model)
        settings = Export(parity=PARITY, quality=None, variants=("fp32", "fp32_fused", "int8", "int4"))
        target = export_model(Recipe(run_dir=Path(scratch)), settings, "gpt2", model, documents)
        proofs = {f"onnx_{one['what'].removeprefix('parity_')}": one for one in read_artifact(target)["evidence"]}
        folders = {name: model if name == VARIANTS[0] else target for name in VARIANTS}
        sizes = {name: (target / proof["file"]).stat().st_size / 2**20 for name, proof in proofs.items()}
        rows = {}
        for key, length in PROMPTS.items():
            text = tokens(documents, read_spec(model), BATCH * length)
            prompts = [[next(text) for _ in range(length)] for _ in range(BATCH)]
            turns, texts = interleave(folders, prompts, arguments.rounds)
            rows[key] = [describe(name, turns, texts, proofs, sizes) for name in VARIANTS]
            for row in rows[key]:
                print(key, row, flush=True)
    results = {
        "command": "python tests/benchmarks/decode.py --out results.json",
        "machine": describe_machine(THREADS),
        "versions": versions(),
        "input": {"model": "GPT-2 124M", "weights": "random", "batch_size": BATCH, "prompts": PROMPTS, "new": NEW},
        "method": f"rounds until {arguments.rounds} count for each variant, {MOST_ROUNDS} at most; in each two windows "
        f"of {WINDOW_S} s of every variant in turn; rounds in which one had less than {MIN_CPU_SHARE:.0%} of the CPU "
        "time that it wanted are not counted; speedup is the median over rounds of its tokens/s over transformers'",
        **rows,
    }
    if arguments.out:
        write_json(arguments.out, results)


def build_model(folder: Path) -> Path:
    """A GPT-2 of the published size, with a tokenizer beside it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(pad_token_id=0)).save_pretrained(folder)
    train_tokenizer(VOCABULARY).save_pretrained(folder)
    return folder


def interleave(
    folders: dict[str, Path], prompts: list[list[int]], rounds: int
) -> tuple[dict[str, list[Turn]], dict[str, list[list[int]]]]:
    """Turns of each variant, one a round, by processes that wait while another measures; and what each generated."""
    context = multiprocessing.get_context("spawn")
    connections, texts = {}, {}
    for name, folder in folders.items():
        connections[name], there = context.Pipe()
        context.Process(target=serve, args=(name, folder, prompts, there), daemon=True).start()
        texts[name] = connections[name].recv()  # loaded and warm
    turns: dict[str, list[Turn]] = {name: [] for name in folders}
    while len(turns[VARIANTS[0]]) < MOST_ROUNDS and min(len(both(turns, name)) for name in folders) < rounds:
        for name, connection in connections.items():
            connection.send("turn")
            turns[name].append(connection.recv())
    for connection in connections.values():
        connection.close()
    return turns, texts


def both(turns: dict[str, list[Turn]], name: str) -> list[tuple[Turn, Turn]]:
    """Turns of transformers and of a variant, of those rounds in which both count."""
    pairs = zip(turns[VARIANTS[0]], turns[name], strict=True)
    return [pair for pair in pairs if all(turn.counts for turn in pair)]


def serve(name: str, folder: Path, prompts: list[list[int]], connection: Connection) -> None:
    """A variant's process: load, warm up, say what it generates, then one turn for each request."""
    call = with_transformers(folder, prompts) if name == VARIANTS[0] else with_ours(name, folder, prompts)
    settings, clock = Settings(THREADS, WINDOW_S, max_windows=3, stability=0.1), SystemClock()
    connection.send(call(NEW))
    with contextlib.suppress(EOFError):  # the parent has all it wants
        while connection.recv():
            call(1)
            first = take_window(lambda: call(1), settings, clock)
            connection.send(Turn(first, take_window(lambda: call(NEW), settings, clock)))


def with_transformers(folder: Path, prompts: list[list[int]]) -> Callable[[int], list[list[int]]]:
    """transformers' own loop, greedy, with its cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(prompts)

    def call(new: int) -> list[list[int]]:
        with torch.inference_mode():
            taken = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                                   eos_token_id=None, pad_token_id=0)  # fmt: skip
        return taken[:, ids.shape[1] :].tolist()

    return call


def with_ours(name: str, folder: Path, prompts: list[list[int]]) -> Callable[[int], list[list[int]]]:
    """An exported form, by `export.generate`."""
    runner, spec = open_runner(folder, name, THREADS), read_spec(folder)  # type: ignore[arg-type]
    return lambda new: generate(runner, spec, prompts, Sampling(new))


def describe(
    name: str,
    turns: dict[str, list[Turn]],
    texts: dict[str, list[list[int]]],
    proofs: dict[str, dict[str, Any]],
    sizes: dict[str, float],
) -> dict[str, Any]:
    """One row: speed over counted rounds, ratio to transformers, and whether a recipe's defaults would let it out."""
    counted = [turn for turn in turns[name] if turn.counts]
    pairs = both(turns, name)
    agreeing = np.array(texts[name]) == np.array(texts[VARIANTS[0]])
    row: dict[str, Any] = {"variant": name, "rounds": len(counted), "contended_rounds": len(turns[name]) - len(counted)}
    row |= {"tokens_as_transformers": float(agreeing.mean())}
    if pairs:
        ratios = [ours.tokens_per_s / theirs.tokens_per_s for theirs, ours in pairs]
        row |= {
            "tokens_per_s": float(np.median([turn.tokens_per_s for turn in counted])),
            "first_token_ms": float(np.median([turn.first.median_s for turn in counted])) * 1e3,
            "speedup": float(np.median(ratios)),
            "speedup_range": [min(ratios), max(ratios)],
        }
    if name in proofs:
        tolerance = getattr(SHIPPED, name.removeprefix("onnx_"))
        row |= {"file_mib": sizes[name], "passes_shipped_gate": holds_under(proofs[name]["metrics"], tolerance)}
    return row


if __name__ == "__main__":
    main()

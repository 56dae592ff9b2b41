"""What our loop costs over a bare hand-written one: same model, batches, optimizer and clipping, in turns.

    python tests/benchmarks/engine_overhead.py [--rounds N] [--out FILE]

Ours is `lmworks pretrain` as it is: data made by its thread, counts and votes, learning rate, gradient norm looked at,
metrics written every ten steps; its step time is the one it reports. The bare loop has its batches ready in a list and
does nothing but forward, backward, clip, step. A round counts only if the process got the CPU time that it wanted.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from export.bench import describe_machine
from export.windows import MIN_CPU_SHARE, SystemClock
from trainer.artifact import versions
from trainer.config import Recipe
from trainer.engine.optim import build_optimizer
from trainer.models import LanguageModel, build, decay_groups
from trainer.objectives.language_model import language_model
from trainer.prepare import run as prepare
from trainer.pretrain import run as pretrain
from trainer.session import Session

STEPS = 40
# Name, and what makes steps of about 20, 70 and 200 ms on two cores of a server CPU.
SIZES = {
    "small": {"hidden_size": 128, "num_hidden_layers": 2, "batch": 8},
    "middle": {"hidden_size": 256, "num_hidden_layers": 3, "batch": 12},
    "large": {"hidden_size": 256, "num_hidden_layers": 4, "batch": 32},
}


def recipe(folder: Path, size: dict) -> Recipe:
    hidden, layers, batch = size["hidden_size"], size["num_hidden_layers"], size["batch"]
    config = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4,
              "intermediate_size": 4 * hidden, "hidden_dropout_prob": 0.0,
              "attention_probs_dropout_prob": 0.0}  # fmt: skip
    return Recipe.model_validate(
        {
            "run_dir": str(folder),
            "prepare": {
                "sources": [{"type": "stdlib", "on_bad_document": "skip"}],
                "tokenizer": {"type": "wordpiece", "vocab_size": 4096, "max_training_mib": 4.0},
                "validation_fraction": 0.03,
            },
            "pretrain": {
                "model": {"architecture": "bert", "config": config},
                "objective": {"name": "masked_lm"},
                "data": {"sequence_length": 128},
                "max_steps": STEPS,
                "global_batch_size": batch,
                "micro_batch_size": batch,
                "eval_every_steps": 10**6,
                "eval_sequences": batch,
                "save_every_steps": 10**6,
                "resume": False,
            },
        }
    )


def ours_s(made: Recipe) -> list[float]:
    """Seconds of each step as lmworks reports them, the first ten left out."""
    metrics = made.stage_dir("pretrain") / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    pretrain(made)
    rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if row["event"] == "train"]
    return [row["step_time_s"] for row in rows[1:]]


def bare_s(made: Recipe) -> list[float]:
    """Seconds of each step of the plain loop, the first ten left out, in means of ten."""
    stage = made.pretrain
    assert stage is not None
    session = Session(made, "pretrain", stage, stage.objective, stage.data)
    model = build(stage.model, session.tokenizer, session.causal, stage.data.sequence_length, made.seed)
    run = session.wire(model, language_model, {})
    batches = [run.batches(step)[0] for step in range(STEPS)]
    module = LanguageModel(build(stage.model, session.tokenizer, session.causal, stage.data.sequence_length, made.seed))
    module.train()
    optimizer = build_optimizer(
        stage.optim, decay_groups(module, 0.01), lambda text: None, device_type="cpu", offload=False, sharded=False
    )
    ends = [time.perf_counter()]
    for batch in batches:
        loss = language_model(module, batch)
        loss.divided({"targets": batch.num_targets, "tokens": batch.num_tokens}).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return [(ends[at + 10] - ends[at]) / 10 for at in range(10, STEPS, 10)]


def compare(folder: Path, size: dict, rounds: int) -> dict:
    """Alternate the two; the ratio of each round that had the CPUs, and the median of them."""
    clock, seen = SystemClock(), []
    made = recipe(folder, size)
    while sum(one["counted"] for one in seen) < rounds and len(seen) < 4 * rounds:
        cpu_s, queued_s = clock.cpu_s(), clock.queued_s()
        ours, bare = statistics.median(ours_s(made)), statistics.median(bare_s(made))
        got_s, queued_after_s = clock.cpu_s() - cpu_s, clock.queued_s()
        assert queued_s is not None and queued_after_s is not None, "needs Linux's /proc/self/schedstat"
        share = got_s / (got_s + max(0.0, queued_after_s - queued_s))
        seen.append({"ours_s": ours, "bare_s": bare, "cpu_share": share, "counted": share >= MIN_CPU_SHARE})
        print(seen[-1], file=sys.stderr)
    ratios = [one["ours_s"] / one["bare_s"] for one in seen if one["counted"]]
    median = statistics.median(ratios) if ratios else None
    return {**size, "ours_to_bare": median, "range": [min(ratios), max(ratios)] if ratios else None, "rounds": seen}


def main() -> None:
    """Measure all sizes and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(recipe(folder, SIZES["small"]))
        results = {name: compare(folder, size, arguments.rounds) for name, size in SIZES.items()}
    report = {
        "command": f"python tests/benchmarks/engine_overhead.py --rounds {arguments.rounds}",
        "peer": "a bare loop over the same model, batches, optimizer and clipping",
        "machine": describe_machine(torch.get_num_threads()),
        "versions": versions(),
        "results": results,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

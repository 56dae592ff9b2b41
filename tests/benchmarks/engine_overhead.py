"""What our loop costs over a bare hand-written one, and over transformers' Trainer: same model, batches, objective,
optimizer and clipping, in turns.

    python tests/benchmarks/engine_overhead.py [--rounds N] [--threads N] [--sizes NAME …] [--out FILE]

Ours is `lmworks pretrain` as it is: data made, counts and votes, learning rate, gradient norm looked at,
metrics written every ten steps; its step time is the one it reports. The bare loop and Trainer have their batches ready
in a list; the former does nothing but forward, backward, clip, step, the latter logs every ten steps as we do. By
default one thread computes, so that nothing of ours is hidden behind a product.
A round counts only if the process got the CPU time that it wanted.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from export.bench import describe_machine
from export.windows import MIN_CPU_SHARE, SystemClock
from trainer.artifact import versions
from trainer.config import Recipe
from trainer.data.stream import Batch
from trainer.engine.optim import build_optimizer
from trainer.models import LanguageModel, build, decay_groups
from trainer.objectives.language_model import language_model
from trainer.prepare import run as prepare
from trainer.pretrain import run as pretrain
from trainer.session import Session

# Name, and what makes steps of about 20, 40, 250 and 800 ms on one core of a server CPU, for some seconds.
SIZES = {
    "least": {"hidden_size": 128, "num_hidden_layers": 2, "batch": 4, "steps": 160},
    "small": {"hidden_size": 128, "num_hidden_layers": 2, "batch": 8, "steps": 160},
    "middle": {"hidden_size": 256, "num_hidden_layers": 3, "batch": 12, "steps": 40},
    "large": {"hidden_size": 256, "num_hidden_layers": 4, "batch": 32, "steps": 30},
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
                "max_steps": size["steps"],
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


def peer(made: Recipe) -> tuple[LanguageModel, torch.optim.Optimizer, list[Batch]]:
    """Another copy of what ours trains: the model, its optimizer, and the batches of all steps, made beforehand."""
    stage = made.pretrain
    assert stage is not None
    session = Session(made, "pretrain", stage, stage.objective, stage.data)

    def fresh() -> PreTrainedModel:
        return build(stage.model, session.tokenizer, session.causal, stage.data.sequence_length, made.seed)

    run = session.wire(fresh(), language_model, {})
    batches = [run.batches(step)[0] for step in range(stage.max_steps)]
    module = LanguageModel(fresh())
    module.train()
    optimizer = build_optimizer(
        stage.optim, decay_groups(module, 0.01), lambda text: None, device_type="cpu", offload=False, sharded=False
    )
    return module, optimizer, batches


def share(module: LanguageModel, batch: Batch) -> torch.Tensor:
    return language_model(module, batch).divided({"targets": batch.num_targets, "tokens": batch.num_tokens})


def in_tens(ends_s: list[float]) -> list[float]:
    """Seconds of each step, the first ten left out, in means of ten."""
    return [(ends_s[at + 10] - ends_s[at]) / 10 for at in range(10, len(ends_s) - 1, 10)]


def bare_s(made: Recipe) -> list[float]:
    """Seconds of each step of the plain loop."""
    module, optimizer, batches = peer(made)
    ends_s = [time.perf_counter()]
    for batch in batches:
        share(module, batch).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends_s.append(time.perf_counter())
    return in_tens(ends_s)


class OverBatches(Trainer):
    """Trainer on our objective; a sample of its data set is one of our batches."""

    def compute_loss(self, model: LanguageModel, inputs: dict[str, Batch], *args: object, **kwargs: object) -> Any:
        return share(model, inputs["batch"])


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends_s = [time.perf_counter()]

    def on_step_end(self, args: object, state: object, control: object, **rest: object) -> None:
        self.ends_s.append(time.perf_counter())


def trainer_s(made: Recipe) -> list[float]:
    """Seconds of each step of transformers' Trainer."""
    module, optimizer, batches = peer(made)
    clock = Clock()
    arguments = TrainingArguments(output_dir=str(made.run_dir / "trainer"), per_device_train_batch_size=1,
                                  max_steps=len(batches), max_grad_norm=1.0, logging_steps=10, report_to="none",
                                  save_strategy="no", disable_tqdm=True, use_cpu=True,
                                  remove_unused_columns=False)  # fmt: skip
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    OverBatches(module, arguments, lambda samples: {"batch": samples[0]}, batches, optimizers=(optimizer, constant),
                callbacks=[clock]).train()  # fmt: skip
    return in_tens(clock.ends_s)


def compare(folder: Path, size: dict, rounds: int) -> dict:
    """Alternate the three; ours to each of the others in the rounds that had the CPUs, and the medians of them."""
    clock, seen = SystemClock(), []
    made = recipe(folder, size)
    while sum(one["counted"] for one in seen) < rounds and len(seen) < 4 * rounds:
        cpu_s, queued_s = clock.cpu_s(), clock.queued_s()
        medians = {side.__name__: statistics.median(side(made)) for side in (ours_s, bare_s, trainer_s)}
        got_s, queued_after_s = clock.cpu_s() - cpu_s, clock.queued_s()
        assert queued_s is not None and queued_after_s is not None, "needs Linux's /proc/self/schedstat"
        cpu_share = got_s / (got_s + max(0.0, queued_after_s - queued_s))
        seen.append(medians | {"cpu_share": cpu_share, "counted": cpu_share >= MIN_CPU_SHARE})
        print(seen[-1], file=sys.stderr)
    result: dict[str, Any] = {**size, "rounds": seen}
    for other in ("bare", "trainer"):
        ratios = [one["ours_s"] / one[f"{other}_s"] for one in seen if one["counted"]]
        result[f"ours_to_{other}"] = statistics.median(ratios) if ratios else None
        result[f"ours_to_{other}_range"] = [min(ratios), max(ratios)] if ratios else None
    return result


def main() -> None:
    """Measure all sizes and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(recipe(folder, SIZES["small"]))
        results = {name: compare(folder, SIZES[name], arguments.rounds) for name in arguments.sizes}
    flags = f"--rounds {arguments.rounds} --threads {arguments.threads}"
    flags += f" --sizes {' '.join(arguments.sizes)}" if arguments.sizes != [*SIZES] else ""
    report = {
        "command": f"python tests/benchmarks/engine_overhead.py {flags}",
        "peers": "a bare loop, and transformers' Trainer, over the same model, batches, optimizer and clipping",
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

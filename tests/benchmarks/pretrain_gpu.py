"""Pretraining on one GPU: our trainer beside transformers' Trainer and a bare loop, in tokens a second and MFU.

    python tests/benchmarks/pretrain_gpu.py [--model gpt2 bert] [--rounds N] [--out FILE]
    python tests/benchmarks/pretrain_gpu.py --smoke      the same code with tiny models, on a CPU too; no figures

gpt2: GPT-2 124M on rows of 1024 tokens, one stream cut into rows, as nanoGPT trains it. bert: BERT-base, masked LM on
rows of 512 tokens into which documents are packed: ours keeps the documents apart, for the others they run into each
other, as in transformers' run_mlm.py. All in bf16 with fused AdamW, clipping and torch.compile, without dropout.

Ours is `lmworks pretrain` as it is, by its own step times: data made, kernels and loss on auto, counts,
votes, norms looked at, metrics written. The bare loop does nothing but forward, backward, clip and step of a compiled
model over batches that lie on the GPU; Trainer gets the same rows from a list. The sides train in turns in one process,
a window each in a round. MFU counts the FLOPs that training needs (heads at targets alone), against the datasheet and
against what this card does in a large bf16 matrix product, measured in each round.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would take all that it sees

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from export.bench import describe_machine
from export.windows import MIN_CPU_SHARE, SystemClock
from trainer.artifact import versions, write_json
from trainer.config import Recipe
from trainer.data.stream import Batch
from trainer.engine import loop
from trainer.environment import gpus, launch_command, peak_flops
from trainer.models import build, decay_groups, load_tokenizer, train_flops
from trainer.objectives.language_model import language_model
from trainer.prepare import run as prepare
from trainer.session import Session

SIDES = ("ours", "bare", "trainer")
IGNORED = -100  # torch's own ignore_index
MATRIX = 8192  # bf16 products of this size are as fast as a card gets (FACTS of an H200: 790 of 989 TFLOP/s)
# An eager step of the bare loop, which makes all logits at once, may take this share of the memory; the rest is for
# the other two models, and for what the allocator cannot use. Assumed.
PROBE_SHARE = 0.6


@dataclass(frozen=True)
class Size:
    """What is trained, and how long a window is."""

    architecture: str
    config: dict[str, Any]
    sequence_length: int
    micro_batches: tuple[int, ...]  # to be tried, the largest first
    warm_steps: int = 10  # at the beginning of a window, not counted
    counted_steps: int = 30
    sources: str = "*.py"  # files in the folder of Python's standard library
    vocab_size: int = 8192  # of the tokenizer; the models' tables are larger

    @property
    def steps(self) -> int:
        return self.warm_steps + self.counted_steps

    @property
    def causal(self) -> bool:
        return self.architecture == "gpt2"


# Radford et al. 2019 with nanoGPT's padded table; Devlin et al. 2018 (arXiv:1810.04805), base.
GPT2 = {"vocab_size": 50304, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BERT = {"vocab_size": 30522, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES = {
    "gpt2": Size("gpt2", GPT2, 1024, (64, 32, 16, 8)),
    "bert": Size("bert", BERT, 512, (128, 64, 32, 16)),
}
_SMOKE = {"warm_steps": 2, "counted_steps": 2, "sources": "email/*.py", "vocab_size": 300}
SMOKE_SIZES = {
    "gpt2": Size("gpt2", GPT2 | {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2}, 64, (2,), **_SMOKE),
    "bert": Size(
        "bert",
        BERT | {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        64,
        (2,),
        **_SMOKE,
    ),
}


def recipe(folder: Path, size: Size, micro_batch: int, compiled: bool) -> Recipe:
    objective = {"name": "causal_lm"} if size.causal else {"name": "masked_lm", "whole_word": False}
    return Recipe.model_validate(
        {
            "run_dir": str(folder),
            "prepare": {
                "sources": [{"type": "text", "paths": [str(Path(sysconfig.get_paths()["stdlib"]) / size.sources)],
                             "on_bad_document": "skip"}],
                "tokenizer": {"type": "byte_level_bpe" if size.causal else "wordpiece",
                              "vocab_size": size.vocab_size, "max_training_mib": 4.0},
                "validation_fraction": 0.2,
            },
            "pretrain": {
                "model": {"architecture": size.architecture, "config": size.config},
                "objective": objective,
                "data": {"sequence_length": size.sequence_length,
                         "packing": "concatenate" if size.causal else "isolate"},
                "max_steps": size.steps,
                "global_batch_size": micro_batch,
                "micro_batch_size": micro_batch,
                "precision": "bf16",
                "compile": compiled,
                "optim": {"learning_rate": 1e-4, "weight_decay": 0.1},
                "schedule": {"name": "constant"},
                "eval_every_steps": 10**9,
                "eval_sequences": micro_batch,
                "log_every_steps": size.warm_steps,
                "save_every_steps": 10**9,
                "keep_last": 1,
            },
        }
    )  # fmt: skip


class Side(Protocol):
    """One of those that are compared."""

    def window(self) -> float:
        """Train on for a window; real tokens a second of its counted steps."""
        ...


class Ours:
    """Our loop, one window after another of one run."""

    def __init__(self, model: PreTrainedModel, made: Recipe, size: Size) -> None:
        assert made.pretrain is not None
        stage = made.pretrain
        self.run = Session(made, "pretrain", stage, stage.objective, stage.data).wire(model, language_model, {})
        self._metrics = made.stage_dir("pretrain") / "metrics.jsonl"
        self._size, self._at = size, 0

    def window(self) -> float:
        first, self._at = self._at, self._at + self._size.steps
        (part,) = self.run.parts
        part = replace(part, training=part.training.model_copy(update={"max_steps": self._at}))
        loop.train(replace(self.run, parts=(part,)), first)
        rows = [json.loads(line) for line in self._metrics.read_text().splitlines()]
        counted = [row for row in rows if row["event"] == "train" and row["step"] > first + self._size.warm_steps]
        seconds = sum(row["step_time_s"] for row in counted)
        return sum(row["tokens_per_s"] * row["step_time_s"] for row in counted) / seconds


class Rows(NamedTuple):
    """A batch for those who know no documents."""

    input_ids_BT: Tensor
    labels_BT: Tensor  # the target that each place predicts, IGNORED where there is none
    tokens: int  # real ones

    @classmethod
    def of(cls, batch: Batch) -> "Rows":
        ids_BT = batch.input_ids.long()
        labels_BT = torch.full_like(ids_BT, IGNORED)
        labels_BT.view(-1)[batch.target_places] = batch.targets.long()
        return cls(ids_BT, labels_BT, batch.num_tokens)

    def samples(self, causal: bool) -> list[dict[str, Tensor]]:
        """Row by row for Trainer; of causal models transformers shifts the labels itself."""
        labels_BT = self.input_ids_BT if causal else self.labels_BT
        pairs = zip(self.input_ids_BT.cpu(), labels_BT.cpu(), strict=True)
        return [{"input_ids": row, "labels": labels} for row, labels in pairs]


class WithLoss(nn.Module):
    """Logits everywhere and their mean cross entropy in one graph, as nanoGPT's forward has them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        more = {"use_cache": False} if self.model.config.model_type == "gpt2" else {}
        logits_BTV = self.model(input_ids=input_ids_BT, **more).logits
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED)


class Bare:
    """The plain loop."""

    def __init__(self, model: PreTrainedModel, rows: list[Rows], size: Size, compiled: bool) -> None:
        self.device = rows[0].input_ids_BT.device
        self.module = WithLoss(model.to(self.device)).train()
        self.forward: Callable[[Tensor, Tensor], Tensor] = torch.compile(self.module) if compiled else self.module
        self.optimizer = torch.optim.AdamW(decay_groups(self.module, 0.1), lr=1e-4, fused=True)
        self.rows = rows
        self._size, self._at = size, 0

    def step(self) -> int:
        """One step; returns its tokens."""
        rows = self.rows[self._at % len(self.rows)]
        self._at += 1
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.forward(rows.input_ids_BT, rows.labels_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return rows.tokens

    def window(self) -> float:
        for _ in range(self._size.warm_steps):
            self.step()
        began = now_s(self.device)
        tokens = sum(self.step() for _ in range(self._size.counted_steps))
        return tokens / (now_s(self.device) - began)


class Clock(TrainerCallback):
    """When the counted steps of a window began and ended, the GPU waited for."""

    def __init__(self, device: torch.device, first: int, last: int) -> None:
        self._device, self._when = device, (first, last)
        self.marks_s: list[float] = []

    def on_step_end(self, args: object, state: Any, control: object, **rest: object) -> None:
        if state.global_step in self._when:
            self.marks_s.append(now_s(self._device))


class Theirs:
    """transformers' Trainer; each window is a call of its train()."""

    def __init__(self, model: PreTrainedModel, rows: list[Rows], size: Size, compiled: bool, folder: Path) -> None:
        device = rows[0].input_ids_BT.device
        samples: Any = [sample for batch in rows for sample in batch.samples(size.causal)]
        micro_batch = len(rows[0].input_ids_BT)
        self._step_tokens = statistics.mean(batch.tokens for batch in rows)
        arguments = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=micro_batch, max_steps=size.steps, bf16=True,
            torch_compile=compiled, optim="adamw_torch_fused", max_grad_norm=1.0, lr_scheduler_type="constant",
            learning_rate=1e-4, weight_decay=0.1, logging_steps=size.warm_steps, report_to="none", save_strategy="no",
            disable_tqdm=True, use_cpu=device.type == "cpu",
        )  # fmt: skip
        os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)  # set just now; the next Engine would compile by it
        self._clock = Clock(device, size.warm_steps, size.steps)
        self._trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[self._clock])
        self._trainer.remove_callback(PrinterCallback)
        self._size = size

    def window(self) -> float:
        self._clock.marks_s.clear()
        self._trainer.train()
        began, ended = self._clock.marks_s
        return self._step_tokens * self._size.counted_steps / (ended - began)


def now_s(device: torch.device) -> float:
    """The time, once the GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_flops(device: torch.device, width: int = MATRIX, times: int = 30) -> float:
    """FLOP/s of bf16 products of square matrices of random numbers (zeros draw less power, and are faster)."""
    one, two = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(one)
    for _ in range(3):
        torch.mm(one, two, out=out)
    began = now_s(device)
    for _ in range(times):
        torch.mm(one, two, out=out)
    return times * 2 * width**3 / (now_s(device) - began)


def largest_micro_batch(fresh: Callable[[], PreTrainedModel], size: Size, device: torch.device) -> int:
    """The first of the sizes whose eager step leaves room for the rest."""
    limit = PROBE_SHARE * torch.cuda.get_device_properties(device).total_memory
    for micro_batch in size.micro_batches:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ids_BT = torch.randint(size.vocab_size, (micro_batch, size.sequence_length), device=device)
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            Bare(fresh(), [Rows(ids_BT, ids_BT, ids_BT.numel())], size, compiled=False).step()
            if torch.cuda.max_memory_allocated() < limit:
                return micro_batch
    raise SystemExit(f"not even {size.micro_batches[-1]} rows of {size.architecture} fit")


def take_turns(
    making: dict[str, Callable[[], Side]], rounds: int, device: torch.device, width: int
) -> tuple[list[dict[str, float]], dict[str, str]]:
    """A window of each side in each round, every round beginning with another; and why a side failed, if one did.

    The first round only warms up: it compiles.
    """
    sides: dict[str, Side] = {}
    failed: dict[str, str] = {}
    seen: list[dict[str, float]] = []
    clock = SystemClock()
    for number in range(rounds + 1):
        cpu_s, queued_s = clock.cpu_s(), clock.queued_s() or 0.0
        taken = {"matmul_flops": matmul_flops(device, width)}
        for name in SIDES[number % 3 :] + SIDES[: number % 3]:
            if name in failed:
                continue
            try:
                sides[name] = sides[name] if name in sides else making[name]()
                taken[name] = sides[name].window()
            except Exception as error:  # the others' figures are worth having; a rented GPU is not there for long
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {error}"[:500]
        got_s = clock.cpu_s() - cpu_s
        taken["cpu_share"] = got_s / (got_s + max(0.0, (clock.queued_s() or 0.0) - queued_s))
        print(taken, file=sys.stderr)
        seen += [taken] if number else []
    return seen, failed


def summarize(seen: list[dict[str, float]], flops_per_token: float, datasheet_flops: float | None) -> dict[str, Any]:
    """Medians over the rounds, MFU of them, and ours to each of the others round by round."""
    if not seen:
        return {"tokens_per_s": {}}
    there = [side for side in SIDES if all(side in one for one in seen)]
    tokens_per_s = {side: statistics.median(one[side] for one in seen) for side in there}
    measured_flops = statistics.median(one["matmul_flops"] for one in seen)
    result: dict[str, Any] = {"tokens_per_s": tokens_per_s}
    for name, peak in (("datasheet", datasheet_flops), ("matmul", measured_flops)):
        mfu = {side: tokens_per_s[side] * flops_per_token / peak for side in there} if peak else None
        result |= {f"{name}_flops": peak, f"mfu_of_{name}": mfu}
    for other in ("bare", "trainer"):
        ratios = [one["ours"] / one[other] for one in seen if {"ours", other} <= set(there)]
        result[f"ours_to_{other}"] = statistics.median(ratios) if ratios else None
        result[f"ours_to_{other}_range"] = [min(ratios), max(ratios)] if ratios else None
    return result


def compare(folder: Path, size: Size, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one model; the micro-batch is found first, unless it is given. Rounds in which the process did not get
    the CPU time that it wanted do not count, but for a smoke test, whose figures mean nothing."""
    micro_batch, compiled = arguments.micro_batch, arguments.compile
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    made = recipe(folder, size, size.micro_batches[-1], compiled)
    prepare(made)
    assert made.pretrain is not None
    tokenizer = load_tokenizer(made.tokenizer_dir)
    fresh = partial(build, made.pretrain.model, tokenizer, size.causal, size.sequence_length, made.seed)
    if micro_batch is None:
        micro_batch = largest_micro_batch(fresh, size, device)
    model = fresh()
    flops = train_flops(model, size.sequence_length)
    # Ours first: the others find Accelerate's state of the process as it leaves it.
    ours = Ours(model, recipe(folder, size, micro_batch, compiled), size)
    batches = [ours.run.batches(step)[0] for step in range(8)]
    rows = [Rows.of(batch) for batch in batches]
    making: dict[str, Callable[[], Side]] = {
        "ours": lambda: ours,
        "bare": lambda: Bare(fresh(), rows, size, compiled),
        "trainer": lambda: Theirs(fresh(), rows, size, compiled, folder / "trainer"),
    }
    seen, failed = take_turns(making, arguments.rounds, device, 128 if arguments.smoke else MATRIX)
    counted = [one for one in seen if arguments.smoke or one["cpu_share"] >= MIN_CPU_SHARE]
    tokens = sum(batch.num_tokens for batch in batches)
    flops_per_token = flops.of(tokens, sum(batch.num_targets for batch in batches)) / tokens
    sheet = peak_flops(torch.cuda.get_device_name(device), "bf16") if device.type == "cuda" else None
    about = {"micro_batch": micro_batch, "sequence_length": size.sequence_length, "flops_per_token": flops_per_token,
             "warm_steps": size.warm_steps, "counted_steps": size.counted_steps, "failed": failed,
             "rounds_counted": len(counted)}  # fmt: skip
    return about | summarize(counted, flops_per_token, sheet) | {"rounds": seen}


def measure(sizes: dict[str, Size], arguments: argparse.Namespace) -> dict[str, Any]:
    """The report; written after each model, so that what there is survives a run that is cut short."""
    report: dict[str, Any] = {
        "command": launch_command(),
        "peers": "a bare loop, and transformers' Trainer, over the same model, rows, optimizer, clipping and precision",
        "machine": describe_machine(torch.get_num_threads()),
        "gpus": gpus(),
        "versions": versions(),
        "smoke": arguments.smoke,
        "results": {},
    }
    for name in arguments.model:
        with tempfile.TemporaryDirectory() as scratch:
            report["results"][name] = compare(Path(scratch), sizes[name], arguments)
        if arguments.out:
            write_json(arguments.out, report)
    return report


def main(words: list[str] | None = None) -> int:
    """Measure and print the result; 1 if a side failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, help="rows in a step; without it the largest that fits")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--smoke", action="store_true", help="tiny models, to see that all of it runs")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(words)
    if arguments.smoke:
        arguments.micro_batch = arguments.micro_batch or 2
    elif not torch.cuda.is_available():
        parser.error("needs a GPU; --smoke runs anywhere")
    report = measure(SMOKE_SIZES if arguments.smoke else SIZES, arguments)
    print(json.dumps(report, indent=2))
    return 1 if any(result["failed"] for result in report["results"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())

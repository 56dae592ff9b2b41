"""The training loop, the same for every stage that trains, and evaluation on a held-out split.
It says in which order things happen; each of them is somewhere else."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from trainer.config import Training
from trainer.data.stream import Batch, TrainStream
from trainer.engine.checkpoint import Checkpoints
from trainer.engine.engine import Engine
from trainer.engine.launch import stop_requested
from trainer.engine.metrics import Log, Meter, require_finite
from trainer.engine.optim import learning_rate_at
from trainer.errors import Preempted
from trainer.objectives.language_model import language_model
from trainer.objectives.loss import LossSum, Objective


@dataclass(frozen=True)
class Run:
    """The pieces of one training run, wired by a stage."""

    training: Training
    seed: int
    engine: Engine
    objective: Objective
    stream: TrainStream
    validation: Callable[[], Iterator[Batch]]
    checkpoints: Checkpoints
    meter: Meter
    log: Log
    bytes_per_token: float | None  # of the validation text; None: no bits per byte (masked LM)


def train(run: Run) -> dict[str, float]:
    """Take optimizer steps until `max_steps`; returns the last evaluation.

    Raises Preempted if any rank was asked to stop; the run is saved then.
    """
    step, evaluation = _resume(run), None
    while True:
        if step % run.training.eval_every_steps == 0 or step == run.training.max_steps:
            evaluation = evaluate(run, step)
        if step == run.training.max_steps and evaluation is not None:
            return evaluation
        with run.meter.waiting():
            batches = run.stream.micro_batches(step)
        counts, stop = _count(run.engine, batches)
        if stop:
            _save(run, step)
            raise Preempted(f"stopped by a signal after step {step}, and saved; run the same command to go on")
        _step(run, step, batches, counts)
        step += 1
        if step % run.training.log_every_steps == 0:
            _report(run, step)
        if run.checkpoints.due(step):
            _save(run, step)


def evaluate(run: Run, step: int) -> dict[str, float] | None:
    """Loss, perplexity and accuracy on the validation rows; None, and nothing reported, if a signal cut it short."""
    totals = {"loss": 0.0, "accuracy": 0.0, "targets": 0.0}
    model = run.engine.unwrapped.eval()
    with torch.inference_mode(), run.engine.autocast():
        for batch in run.validation():
            if run.engine.agree(stop_requested()):
                return None
            loss = language_model(model, batch.to(run.engine.device))
            totals["loss"] += float(loss.terms["loss"].total)
            totals["accuracy"] += float(loss.reported["accuracy"])
            totals["targets"] += batch.num_targets
    totals = dict(zip(totals, run.engine.sum(list(totals.values())), strict=True))
    loss_nats = totals["loss"] / totals["targets"]
    row = {"tokens": run.meter.tokens, "loss": loss_nats, "perplexity": math.exp(min(loss_nats, 700.0))}
    row["accuracy" if run.bytes_per_token else "masked_accuracy"] = totals["accuracy"] / totals["targets"]
    if run.bytes_per_token:
        row["bits_per_byte"] = loss_nats / math.log(2) / run.bytes_per_token
    run.log.event("eval", step, **row)
    run.log.say("  ".join([f"step {step}: validation", *(f"{name} {value:.6g}" for name, value in row.items())]))
    return row


def _resume(run: Run) -> int:
    resumed = run.checkpoints.resume()
    if resumed is None:
        run.log.event("start", 0)
        return 0
    run.meter.tokens = resumed.state["tokens"]
    run.log.event("resume", resumed.step)
    return resumed.step


def _count(engine: Engine, batches: list[Batch]) -> tuple[dict[str, float], bool]:
    """Targets and tokens of the step, and whether any rank was asked to stop; all ranks get the same answer."""
    targets = sum(batch.num_targets for batch in batches)
    tokens = sum(batch.num_tokens for batch in batches)
    all_targets, all_tokens, stops = engine.sum([float(targets), float(tokens), float(stop_requested())])
    return {"targets": all_targets, "tokens": all_tokens}, stops > 0


def _step(run: Run, step: int, batches: list[Batch], counts: dict[str, float]) -> None:
    schedule = run.training.schedule
    learning_rate = learning_rate_at(step, run.training.optim.learning_rate, schedule, run.training.max_steps)
    run.engine.begin_step(step, learning_rate, run.seed)
    for number, batch in enumerate(batches, start=1):
        with run.engine.autocast():
            loss: LossSum = run.objective(run.engine.model, batch.to(run.engine.device))
        run.engine.backward(loss.divided(counts), last=number == len(batches))
        run.meter.add(loss)
    run.meter.step(counts, run.engine.step())


def _report(run: Run, step: int) -> None:
    row = run.meter.flush()
    samples = step * run.training.global_batch_size
    training = run.training
    learning_rate = learning_rate_at(step - 1, training.optim.learning_rate, training.schedule, training.max_steps)
    run.log.event("train", step, samples=samples, tokens=run.meter.tokens, learning_rate=learning_rate, **row)
    require_finite(row, step, (samples - training.log_every_steps * training.global_batch_size, samples - 1))
    run.log.progress(step, row)


def _save(run: Run, step: int) -> None:
    """A checkpoint, after making sure that no step since the last report went wrong."""
    if run.meter.has_steps():
        _report(run, step)
    run.checkpoints.save(step, {"tokens": run.meter.tokens})

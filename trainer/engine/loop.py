"""The training loop, the same for every stage that trains, and evaluation on a held-out split.
It says in which order things happen; each of them is somewhere else."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from trainer.config import Training
from trainer.data.stream import Batch, TrainStream
from trainer.engine.checkpoint import Checkpoints
from trainer.engine.engine import Engine
from trainer.engine.launch import stop_requested
from trainer.engine.metrics import Log, Meter
from trainer.engine.optim import learning_rate_at
from trainer.engine.strategy import StepResult
from trainer.engine.trouble import Trouble
from trainer.errors import Preempted, UserError
from trainer.objectives.language_model import language_model
from trainer.objectives.loss import LossSum, Objective


@dataclass
class Progress:
    """Where a run is, beside its weights: what a checkpoint keeps as `state`."""

    tokens: int = 0  # real tokens trained on, all ranks
    skipped_steps: int = 0  # steps that were not applied, because a gradient was not finite
    data_shift_steps: int = 0  # batches left out after loss spikes: step s trains on the batches of s + shift
    rewinds: int = 0


@dataclass(frozen=True)
class Part:
    """A phase of a run: the steps from `first_step` on, up to the next part's."""

    first_step: int
    first_sample: int
    training: Training  # max_steps, batch, learning rate and schedule are this part's own
    stream: TrainStream
    validation: Callable[[], Iterator[Batch]]


@dataclass(frozen=True)
class Run:
    """The pieces of one training run, wired by a stage."""

    training: Training  # what is the same in all parts
    seed: int
    engine: Engine
    objective: Objective
    parts: tuple[Part, ...]
    checkpoints: Checkpoints
    meter: Meter
    log: Log
    trouble: Trouble
    progress: Progress
    bytes_per_token: float | None  # of the validation text; None: no bits per byte (masked LM)

    @property
    def last_step(self) -> int:
        """Steps of all parts."""
        return self.parts[-1].first_step + self.parts[-1].training.max_steps

    def part(self, step: int) -> Part:
        """The part that optimizer step `step` (from 0) belongs to."""
        return next(part for part in reversed(self.parts) if part.first_step <= step)

    def learning_rate(self, step: int) -> float:
        """Of optimizer step `step` (from 0)."""
        part = self.part(step)
        training = part.training
        at = step - part.first_step
        return learning_rate_at(at, training.optim.learning_rate, training.schedule, training.max_steps)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step` (from 0)."""
        part = self.part(step)
        return part.stream.micro_batches(step - part.first_step + self.progress.data_shift_steps)

    def make_ahead(self, step: int) -> None:
        """Have the batches of `step` made, if there is such a step."""
        if step < self.last_step:
            part = self.part(step)
            part.stream.make_ahead(step - part.first_step + self.progress.data_shift_steps)


def train(run: Run, step: int) -> dict[str, float]:
    """Take optimizer steps from `step` to the last; returns the last evaluation.

    Raises Preempted if any rank was asked to stop; the run is saved then.
    """
    evaluation = None
    while True:
        if step % run.training.eval_every_steps == 0 or step == run.last_step:
            evaluation = evaluate(run, step)
        if step == run.last_step and evaluation is not None:
            run.checkpoints.finish()
            return evaluation
        with run.meter.waiting():
            batches = run.batches(step)
        counts, stop = count_targets(run, step, batches)
        taken = None if stop else take_step(run, step, batches, counts)
        if taken is None:
            _stop(run, step)
        if run.trouble.spiked(step, taken.loss_share, taken.result, run.engine.loss_scale(), _samples(run, step)):
            step = _rewind(run, step)
            continue
        step += 1
        if step % run.training.log_every_steps == 0:
            _report(run, step)
        if step % run.training.save_every_steps == 0 or step == run.last_step:
            save(run, step)


def evaluate(run: Run, step: int) -> dict[str, float] | None:
    """Loss, perplexity and accuracy on the validation rows; None, and nothing reported, if a signal cut it short."""
    totals = {"loss": 0.0, "accuracy": 0.0, "targets": 0.0}
    model = run.engine.unwrapped.eval()
    with run.meter.paused(), torch.no_grad(), run.engine.autocast():
        for batch in run.part(step).validation():
            if run.engine.ranks.agree(stop_requested(), f"evaluating after step {step}"):
                return None
            loss = language_model(model, batch.to(run.engine.device))
            totals["loss"] += float(loss.terms["loss"].total)
            totals["accuracy"] += float(loss.reported["accuracy"])
            totals["targets"] += batch.num_targets
    totals = dict(zip(totals, run.engine.ranks.sum(list(totals.values()), "adding up an evaluation"), strict=True))
    loss_nats = totals["loss"] / totals["targets"]
    row = {"tokens": run.progress.tokens, "loss": loss_nats, "perplexity": math.exp(min(loss_nats, 700.0))}
    row["accuracy" if run.bytes_per_token else "masked_accuracy"] = totals["accuracy"] / totals["targets"]
    if run.bytes_per_token:
        row["bits_per_byte"] = loss_nats / math.log(2) / run.bytes_per_token
    run.log.event("eval", step, **row)
    run.log.say("  ".join([f"step {step}: validation", *(f"{name} {value:.6g}" for name, value in row.items())]))
    return row


def resume(run: Run) -> int:
    """Load the newest checkpoint, if there is one; returns the step to go on with."""
    resumed = run.checkpoints.resume()
    if resumed is None:
        run.log.event("start", 0)
        return 0
    _take_progress(run, resumed.state)
    run.log.event("resume", resumed.step)
    return resumed.step


def _take_progress(run: Run, state: dict[str, Any]) -> None:
    for name in asdict(run.progress):
        setattr(run.progress, name, state[name])


def count_targets(run: Run, step: int, batches: list[Batch]) -> tuple[dict[str, float], bool]:
    """Targets and tokens of the step, and whether any rank was asked to stop; all ranks get the same answer."""
    targets = sum(batch.num_targets for batch in batches)
    tokens = sum(batch.num_tokens for batch in batches)
    local = [float(targets), float(tokens), float(stop_requested())]
    all_targets, all_tokens, stops = run.engine.ranks.sum(local, f"counting the targets of step {step}")
    return {"targets": all_targets, "tokens": all_tokens}, stops > 0


@dataclass(frozen=True)
class Taken:
    """One optimizer step that was tried."""

    loss_share: Tensor  # this rank's part of the step's loss, scalar; the sum over ranks is the loss
    result: StepResult


def take_step(run: Run, step: int, batches: list[Batch], counts: dict[str, float]) -> Taken | None:
    """Try one optimizer step; None if a signal came between its micro-batches, and nothing was changed."""
    run.engine.begin_step(step, run.learning_rate(step), run.seed)
    total = torch.zeros((), device=run.engine.device)
    for number, batch in enumerate(batches, start=1):
        if number > 1 and run.engine.ranks.agree(stop_requested(), f"accumulating in step {step}"):
            return None
        with run.engine.autocast(), run.meter.forward_watch:
            loss: LossSum = run.objective(run.engine.model, batch.to(run.engine.device))
            share = loss.divided(counts)
        run.engine.backward(share, last=number == len(batches))
        total += share.detach()
        run.meter.add(loss)
    if not run.engine.on_cpu:  # the GPU is still at the backward pass, for which the step waits
        run.make_ahead(step + 1)
    result = run.engine.step()
    run.progress.tokens += int(counts["tokens"])
    run.progress.skipped_steps += not result.applied
    run.meter.step(counts, result)
    return Taken(total, result)


def _samples(run: Run, step: int) -> tuple[int, int]:
    """First and last sample of a step's batch, counted from the beginning of its part."""
    part = run.part(step)
    size = part.training.global_batch_size
    first = (step - part.first_step + run.progress.data_shift_steps) * size
    return first, first + size - 1


def _stop(run: Run, step: int) -> NoReturn:
    save(run, step, in_background=False)
    raise Preempted(f"stopped by a signal after step {step}, and saved; run the same command to go on")


def _rewind(run: Run, step: int) -> int:
    """Go back to the last checkpoint before a loss spike, and leave the batches around it out (PaLM's way)."""
    spike = run.training.loss_spike
    assert spike is not None
    before = run.progress.data_shift_steps, run.progress.rewinds
    if before[1] >= spike.max_rewinds:
        raise UserError(f"the loss spiked at step {step} after {before[1]} rewinds",
                        f"no more than loss_spike.max_rewinds, {spike.max_rewinds}",
                        "lower optim.learning_rate, or raise loss_spike.factor")  # fmt: skip
    run.checkpoints.finish()
    resumed = run.checkpoints.load_newest()
    if resumed is None:
        raise UserError(f"the loss spiked at step {step}, before the first checkpoint", "one to go back to",
                        "lower optim.learning_rate, warm up longer, or lower save_every_steps")  # fmt: skip
    _take_progress(run, resumed.state)
    run.progress.data_shift_steps = before[0] + step - resumed.step + spike.skip_steps
    run.progress.rewinds = before[1] + 1
    run.meter.clear()
    run.log.event("rewind", resumed.step, spiked_at=step, data_shift_steps=run.progress.data_shift_steps)
    run.log.say(f"loss spike at step {step}: back to step {resumed.step}, {spike.skip_steps} batches after it left out")
    return resumed.step


def _report(run: Run, step: int) -> None:
    row = run.meter.flush()
    part = run.part(step - 1)
    samples = part.first_sample + (step - part.first_step) * part.training.global_batch_size
    progress = {"tokens": run.progress.tokens, "skipped_steps": run.progress.skipped_steps}
    run.log.event("train", step, samples=samples, **progress, learning_rate=run.learning_rate(step - 1), **row)
    run.log.progress(step, row)


def save(run: Run, step: int, in_background: bool | None = None) -> None:
    """Report what was not reported, and write a checkpoint; in the background if the recipe says so."""
    if run.meter.has_steps():
        _report(run, step)
    background = run.training.checkpoint.asynchronous and step != run.last_step
    with run.meter.paused():
        run.checkpoints.save(step, asdict(run.progress), background if in_background is None else in_background)

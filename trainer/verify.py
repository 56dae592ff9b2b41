"""The verify verb: proofs on the user's own recipe, machine and number of ranks, before a long run depends on them.
It runs a few steps in scratch folders below `<run_dir>/verify`; what is compared is said, and a miss fails the verb."""

import hashlib
import math
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import trainer.engine.loop as loop
from trainer.__main__ import stage_main
from trainer.artifact import write_json
from trainer.config import Pretrain, Recipe
from trainer.engine.loop import Run
from trainer.engine.ranks import Ranks
from trainer.environment import launch_command
from trainer.errors import GateFailed, UserError
from trainer.models import build
from trainer.objectives.language_model import language_model
from trainer.session import Session

_STEPS = 4  # before the interruption, and between the later ones
# What a gradient may differ from plain fp32's, relative to its size. bf16 keeps 8 bits, tf32 and fp16 11, fp8 3 or 4;
# sums over a network's depth lose a few more (seen on small models: bf16 under 0.02, fp32 under 1e-5).
_GRADIENT_TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 0.05, "fp16": 0.02, "fp8": 0.25}
# Adam divides by the root of the second moment, which blows rounding up where gradients are small.
_UPDATE_TOLERANCE_FACTOR = 5.0
# A tensor whose gradient is smaller than this part of an average one of its size has noise for a gradient (the keys'
# biases of attention have none at all: softmax does not see them).
_NOISE_SHARE = 0.1


@dataclass
class Trace:
    """What one attempt saw: a line for each step, and hashes of weights and moments at the end, by rank."""

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    state: dict[str, str] = field(default_factory=dict)


def resume(recipe: Recipe) -> None:
    """Interrupt a run twice and compare it with one that was never interrupted, to the bit.

    Each interruption leaves a step half done: its first micro-batch, and nothing after it. Compared, on each rank:
    sample ids, the state of the random generator, losses and gradient norms of every step, and all weights and
    optimizer moments at the end. Raises GateFailed for a difference.
    """
    total = 3 * _STEPS
    short = _short(recipe, total)
    whole, _ = _attempt(short, _scratch(recipe, "unbroken"), until=total)
    folder, seen = _scratch(recipe, "interrupted"), Trace()
    for until, abandon in ((_STEPS, True), (2 * _STEPS, True), (total, False)):
        part, ranks = _attempt(short, folder, until, abandon)
        seen = Trace(seen.steps | part.steps, part.state)
    differences = [
        f"rank {ranks.rank}, step {step}: {name} {value!r} unbroken, {seen.steps.get(step, {}).get(name)!r} resumed"
        for step, row in whole.steps.items()
        for name, value in row.items()
        if seen.steps.get(step, {}).get(name) != value
    ]
    differences += [
        f"rank {ranks.rank}: {name} differs at the end"
        for name, value in whole.state.items()
        if seen.state.get(name) != value
    ]
    compared = {"steps": total, "interrupted_at": [_STEPS, 2 * _STEPS], "tensors": len(whole.state)}
    _conclude(recipe, "resume", differences, compared, "a resumed run equal to the unbroken one, to the bit", ranks)


def gradients(recipe: Recipe) -> None:
    """Take a few steps as configured, and the same in plain fp32 on whole tensors; compare what they did.

    Compared: loss, gradient norm before clipping, the running mean of each parameter's clipped gradient (the
    optimizer's exp_avg) and the change of each parameter. Raises GateFailed for a difference above the tolerance.
    """
    plain = {"precision": "fp32", "compile": False, "attention": "sdpa", "cross_entropy": "full",
             "gradient_checkpointing": False, "engine": {"strategy": "ddp"}}  # fmt: skip
    short = _short(recipe, _STEPS)
    configured, _ = _updates(short, _scratch(recipe, "configured"))
    reference, ranks = _updates(_changed(short, plain), _scratch(recipe, "plain"))
    tolerance = _GRADIENT_TOLERANCE[_pretrain(recipe).precision]
    gaps = {
        f"step {step}: {name}": abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-12)
        for step, (ours, theirs) in enumerate(zip(configured.rows, reference.rows, strict=True))
        for name in ("loss", "grad_norm")
    }
    whole = math.sqrt(sum(float(mean.square().sum()) for mean in reference.means.values()))
    elements = sum(mean.numel() for mean in reference.means.values())
    for name, theirs in reference.means.items():
        size, noise = float(theirs.norm()), _NOISE_SHARE * whole * math.sqrt(theirs.numel() / elements)
        gaps[f"gradient of {name}"] = float((configured.means[name] - theirs).norm()) / max(size, noise)
        if size > noise:
            change = reference.changes[name]
            gap = float((configured.changes[name] - change).norm() / change.norm().clamp_min(1e-30))
            gaps[f"update of {name}"] = gap / _UPDATE_TOLERANCE_FACTOR
    differences = [f"{name} differs by {gap:.2%}" for name, gap in gaps.items() if not gap <= tolerance]
    compared = {
        "steps": _STEPS,
        "compared": len(gaps),
        "largest_difference": max(gaps.values()),
        "tolerance": tolerance,
    }
    needed = (
        f"what plain fp32 does, within {tolerance:g} of its size ({_UPDATE_TOLERANCE_FACTOR:g} times that for updates)"
    )
    _conclude(recipe, "gradients", differences if ranks.is_main else [], compared, needed, ranks)


@dataclass(frozen=True)
class _Updates:
    rows: list[dict[str, Any]]
    means: dict[str, torch.Tensor]  # of gradients, by parameter, flat
    changes: dict[str, torch.Tensor]


def _updates(recipe: Recipe, folder: Path) -> tuple[_Updates, Ranks]:
    """Steps of a recipe from its first weights, and what they changed of each whole parameter."""
    run = _wired(recipe, folder)
    before = _whole(run, "weight")
    rows = [_take(run, step) for step in range(_STEPS)]
    after = _whole(run, "weight")
    changes = {name: after[name] - before[name] for name in after}
    return _Updates(rows, _whole(run, "exp_avg"), changes), run.engine.ranks


def _whole(run: Run, wanted: str) -> dict[str, torch.Tensor]:
    """The weight, or an optimizer state, of every parameter, flat, put together from all ranks' fragments."""
    found = {name: torch.zeros(math.prod(shape)) for name, shape in run.engine.shapes.items()}
    for entries in run.engine.ranks.gather(run.engine.snapshot()):
        for entry, tensor in entries.items():
            key, start, name = entry.split("/", 2)
            if key == wanted:
                found[name][int(start) : int(start) + tensor.numel()] = tensor
    return found


def _attempt(recipe: Recipe, folder: Path, until: int, abandon: bool = False) -> tuple[Trace, Ranks]:
    """Run from the newest checkpoint, or the beginning, to step `until`. `abandon`: leave a further step half done."""
    run, trace = _wired(recipe, folder), Trace()
    # The data are those of the middle of epoch 2, where a stream that keeps state is likeliest to go wrong.
    run.progress.data_shift_steps = math.ceil(1.5 * run.parts[0].stream.epoch_steps)
    for step in range(loop.resume(run), until):
        trace.steps[step] = _take(run, step)
        if (step + 1) % _STEPS == 0:
            loop.save(run, step + 1, in_background=False)
    if abandon:
        _half_a_step(run, until)
    else:
        trace.state = {name: _digest(tensor) for name, tensor in run.engine.snapshot().items()}
    return trace, run.engine.ranks


def _take(run: Run, step: int) -> dict[str, Any]:
    """One step, and all that it depended on and came to."""
    batches = run.batches(step)
    counts, _ = loop.count_targets(run, step, batches)
    taken = loop.take_step(run, step, batches, counts)
    if taken is None:
        raise UserError("a signal came; nothing was verified", "", "run the same command again")
    (loss,) = run.engine.ranks.sum([float(taken.loss_share)])
    samples = [sample for batch in batches for sample in batch.sample_ids]
    random = _digest(torch.get_rng_state())
    return {"loss": loss, "grad_norm": taken.result.grad_norm, "samples": samples, "random": random}


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def _half_a_step(run: Run, step: int) -> None:
    """The first micro-batch of a step, and nothing after it: where a killed run may stand."""
    batches = run.batches(step)
    counts, _ = loop.count_targets(run, step, batches)
    run.engine.begin_step(step, 1.0, run.seed)
    with run.engine.autocast():
        loss = run.objective(run.engine.model, batches[0].to(run.engine.device)).divided(counts)
    run.engine.backward(loss, last=False)


def _wired(recipe: Recipe, folder: Path) -> Run:
    stage = _pretrain(recipe)
    session = Session(recipe, "pretrain", stage, stage.objective, stage.data, folder)
    model = build(stage.model, session.tokenizer, session.causal, stage.longest_row, recipe.seed)
    return session.wire(model, language_model, {})


def _pretrain(recipe: Recipe) -> Pretrain:
    if recipe.pretrain is None:
        raise UserError("the recipe has no `pretrain` section", "one that says model, objective and data")
    return recipe.pretrain


def _changed(recipe: Recipe, keys: dict[str, Any]) -> Recipe:
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    tree["pretrain"] |= keys
    return Recipe.model_validate(tree)


def _short(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with so few steps that a proof of it ends soon, and a checkpoint after every few."""
    schedule = {"name": "constant"}  # the recipe's own may not fit so few steps
    few = {"max_steps": steps, "save_every_steps": _STEPS, "schedule": schedule, "resume": True, "phases": []}
    return _changed(recipe, few)


def _scratch(recipe: Recipe, name: str) -> Path:
    """An empty folder for one attempt; the other ranks write into it only after rank 0 has made it."""
    folder = recipe.run_dir / "verify" / name
    if int(os.environ.get("RANK", "0")) == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return folder


def _conclude(
    recipe: Recipe, what: str, differences: list[str], compared: dict[str, Any], needed: str, ranks: Ranks
) -> None:
    """Say and write the outcome; GateFailed on every rank if any found a difference."""
    everybody = [line for lines in ranks.gather(differences) for line in lines]
    report = {"what": f"verify {what}", "command": launch_command(), "ranks": ranks.world, **compared,
              "passed": not everybody, "differences": everybody}  # fmt: skip
    path = recipe.run_dir / "verify" / f"{what}.json"
    if ranks.is_main:
        write_json(path, report)
        shown = ", ".join(f"{name} {value}" for name, value in compared.items())
        print(f"verify {what}: {'FAILED' if everybody else 'passed'}; {shown}; {path}", file=sys.stderr)
    if everybody:
        more = f" and {len(everybody) - 5} more" if len(everybody) > 5 else ""
        raise GateFailed("\n  ".join([f"{what}: {len(everybody)} differences{more}", *everybody[:5]]), needed)


WHAT = {"resume": resume, "gradients": gradients}


def run(recipe: Recipe, what: str, bisect: bool = False) -> None:
    """Run the proof `what`; GateFailed if it fails."""
    if bisect:
        raise UserError(f"verify {what} has no nodes to search", "--bisect with `verify export` only", "leave it out")
    WHAT[what](recipe)


if __name__ == "__main__":
    stage_main("verify")

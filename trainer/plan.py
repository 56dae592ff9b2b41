"""The `plan` verb: parameters, memory a GPU, time and communication of a recipe's training stages, before any of it runs.
The formulas are in `planning`; here they are put together, shown and written. `--probe` measures what they predict.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.__main__ import stage_main
from trainer.artifact import write_json
from trainer.config import EngineConfig, Recipe, nearest_multiples
from trainer.errors import UserError
from trainer.planning.activations import CrossEntropy, MicroBatch
from trainer.planning.cost import (
    computed_flops_per_token,
    flops_per_token,
    forward_flops_per_token,
    step_seconds,
    traffic,
)
from trainer.planning.hardware import GPUS, Gpu
from trainer.planning.memory import (
    Strategy,
    TrainingCase,
    footprint,
    largest_micro_batch,
    standard_strategies,
    strategy_of,
)
from trainer.planning.workload import Workload, workloads

# trainer/heads.py: `cross_entropy: auto` makes all logits at once up to this share of the device's memory.
_WHOLE_LOGITS_SHARE = 1 / 16
_GIB = 2.0**30


def run(
    recipe: Recipe, *, gpus: int, gpu: str, mfu: float, probe: bool = False, json: Path | None = None
) -> dict[str, Any]:
    """Print the plan of each training stage for `gpus` of type `gpu`, and write it to `json`; returns what it wrote."""
    if gpus < 1 or not 0 < mfu <= 1:
        raise UserError(f"--gpus {gpus}, --mfu {mfu}", "at least one GPU, and a share of its peak above 0 and up to 1")
    card = GPUS[gpu]
    plan: dict[str, Any] = {"gpu": asdict(card), "gpus": gpus, "mfu": mfu, "run_dir": str(recipe.run_dir)}
    plan["stages"] = [plan_stage(workload, card, gpus, mfu) for workload in workloads(recipe)]
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 130
    for stage in plan["stages"]:
        _show(console, stage, plan)
    if probe:
        from trainer.planning.probe import probe as measure

        plan["probe"] = measure(recipe)
        _show_probe(console, plan["probe"])
    if json is not None:
        write_json(json, plan)
    return plan


def plan_stage(workload: Workload, gpu: Gpu, gpus: int, mfu: float) -> dict[str, Any]:
    """All numbers of one stage, in the form that goes to the JSON."""
    training, shape, length = workload.training, workload.shape, workload.data.sequence_length
    counts = shape.parameters()
    batch, notes = micro_batch(workload, gpu)
    at_once = training.micro_batch_size * gpus
    accumulation = max(1, training.global_batch_size // at_once)
    if training.global_batch_size % at_once:
        near = nearest_multiples(training.global_batch_size, at_once)
        notes += (f"global_batch_size {training.global_batch_size} does not divide over {gpus} GPU(s); nearest: {near}",)
    flops = flops_per_token(shape, length)
    teacher = forward_flops_per_token(workload.teacher, length) if workload.teacher else 0.0
    step_s = step_seconds((flops + teacher) * workload.step_tokens, gpus, gpu, training.precision, mfu)
    return {
        "stage": workload.stage,
        "architecture": shape.architecture,
        "sizes": {"layers": shape.layers, "hidden": shape.hidden, "heads": shape.heads, "vocabulary": shape.vocabulary},
        "parameters": asdict(counts) | {"total": counts.total, "multiplying": counts.multiplying},
        "teacher_parameters": workload.teacher.parameters().total if workload.teacher else None,
        "precision": training.precision,
        "batch": {
            "sequence_length": length,
            "micro_batch_size": training.micro_batch_size,
            "global_batch_size": training.global_batch_size,
            "accumulation": accumulation,
            "step_tokens": workload.step_tokens,
            "target_share": workload.target_share,
        },
        "cross_entropy": batch.cross_entropy,
        "attention_mask": "dense" if batch.mask_elements else "none",
        "flops_per_token": flops,
        "computed_flops_per_token": computed_flops_per_token(
            shape, length, workload.target_share, training.gradient_checkpointing
        ),
        "teacher_flops_per_token": teacher,
        "tokens": workload.step_tokens * training.max_steps,
        "max_steps": training.max_steps,
        "step_s": step_s,
        "hours": step_s * training.max_steps / 3600,
        "strategies": [
            _strategy_row(workload, batch, strategy, gpu, gpus, accumulation, chosen)
            for strategy, chosen in strategies(training.engine)
        ],
        "notes": list(workload.notes + notes),
    }


def strategies(engine: EngineConfig) -> list[tuple[Strategy, bool]]:
    """What the table compares, and which of it the recipe takes; its own DeepSpeed JSON stands for the shipped one."""
    standard = standard_strategies()
    if engine.zero is None:
        wanted = "ddp" if engine.strategy == "auto" else engine.strategy  # deepspeed: its JSON is the launcher's
        return [(one, one.name.split(" ")[0] == wanted) for one in standard]
    own = strategy_of(engine.zero)
    return [(one, False) for one in standard if one.name != own.name] + [(own, True)]


def micro_batch(workload: Workload, gpu: Gpu | None) -> tuple[MicroBatch, tuple[str, ...]]:
    """The stage's micro-batch on `gpu` (None: a CPU), and what `auto` is taken for."""
    training, shape = workload.training, workload.shape
    tokens = training.micro_batch_size * workload.data.sequence_length
    targets = round(tokens * workload.target_share)
    isolated = workload.data.packing == "isolate"
    dense, notes = _needs_mask(workload, gpu), []
    if isolated and training.attention == "auto" and gpu is not None:
        notes.append(f"attention auto: counted {'with a dense mask (sdpa)' if dense else 'without a mask'}")
    cross_entropy: CrossEntropy = "full"
    if training.cross_entropy != "auto":
        cross_entropy = training.cross_entropy
    elif gpu is not None:
        logits = 4.0 * targets * shape.vocabulary * (2 if workload.teacher else 1)
        cross_entropy = "chunked" if logits > gpu.memory_gb * 1e9 * _WHOLE_LOGITS_SHARE else "full"
        notes.append(f"cross_entropy auto: counted as {cross_entropy} ({logits / _GIB:.2g} GiB of fp32 logits)")
    if training.compile:
        notes.append("compile: torch.compile keeps fewer activations than are counted here")
    if training.precision == "fp8":
        notes.append("precision fp8: memory and peak are counted as for bf16")
    batch = MicroBatch(
        rows=training.micro_batch_size,
        length=workload.data.sequence_length,
        targets=targets,
        isolated=isolated,
        dense_mask=dense,
        checkpointing=training.gradient_checkpointing,
        cross_entropy=cross_entropy,
    )
    return batch, tuple(notes)


def training_case(workload: Workload, batch: MicroBatch, cuda: bool) -> TrainingCase:
    """What decides about the stage's memory."""
    training = workload.training
    return TrainingCase(workload.shape, training.precision, training.optim.name, batch, workload.teacher, cuda)


def _needs_mask(workload: Workload, gpu: Gpu | None) -> bool:
    """Whether the kernel keeps documents apart by a mask tensor (trainer/attention.py): SDPA does; auto takes a kernel
    without on a GPU since the A100, in 16 bits, for attention without dropout."""
    wanted = workload.training.attention
    if wanted != "auto":
        return wanted == "sdpa"
    modern = gpu is not None and gpu.name != "v100"
    half = workload.training.precision in ("bf16", "fp16", "fp8")
    return not (modern and half and workload.shape.attention_dropout == 0)


def _strategy_row(
    workload: Workload, batch: MicroBatch, strategy: Strategy, gpu: Gpu, gpus: int, accumulation: int, chosen: bool
) -> dict[str, Any]:
    case = training_case(workload, batch, cuda=True)
    peak = footprint(case, gpus, strategy)
    other = replace(case, batch=replace(batch, checkpointing=not batch.checkpointing))
    moved = traffic(
        workload.shape.parameters().total, gpus, strategy, workload.training.precision, accumulation, gpu
    )
    parts = {
        "weights": peak.states.weights,
        "weight_copies": peak.casts,
        "gradients": peak.states.gradients,
        "master_weights": peak.states.master,
        "optimizer": peak.states.moments,
        "buffers": peak.buffers,
        "teacher": peak.teacher,
        "activations": peak.activations,
        "logits": peak.logits,
        "update": peak.update,
        "total": peak.total,
        "host": peak.states.host,
        "nvme": peak.states.nvme,
    }
    return {
        "strategy": strategy.name,
        "chosen": chosen,
        "gib": {name: value / _GIB for name, value in parts.items()},
        "peak_at": peak.moment,
        "fits": peak.total <= gpu.usable_bytes,
        "largest_micro_batch": largest_micro_batch(case, gpus, strategy, gpu.usable_bytes),
        "other_checkpointing": {
            "gradient_checkpointing": not batch.checkpointing,
            "total_gib": footprint(other, gpus, strategy).total / _GIB,
            "largest_micro_batch": largest_micro_batch(other, gpus, strategy, gpu.usable_bytes),
        },
        "communication": {"gb_per_step": (moved.ring_bytes + moved.node_bytes) / 1e9, "s_per_step": moved.seconds},
    }


def _show(console: Console, stage: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    gpu, batch, sizes = plan["gpu"], stage["batch"], stage["sizes"]
    where = f"{plan['gpus']} x {gpu['name']} ({gpu['memory_gb']:g} GB)"
    console.print(f"\n[bold]{stage['stage']}[/bold]: {stage['architecture']} on {where}, {stage['precision']}")
    shapes = ", ".join(f"{name} {value}" for name, value in sizes.items())
    teacher = stage["teacher_parameters"]
    more = f"; teacher {teacher:,}" if teacher else ""
    console.print(f"  parameters     {stage['parameters']['total']:,} ({shapes}){more}")
    console.print(
        f"  step           {batch['global_batch_size']} rows of {batch['sequence_length']} tokens = "
        f"{batch['step_tokens']:,} tokens; {batch['micro_batch_size']} rows x {batch['accumulation']} on each GPU"
    )
    head = f", {stage['computed_flops_per_token']:.3g} really computed"
    console.print(f"  FLOPs a token  {stage['flops_per_token']:.4g} (6 N + 12 L D T{head})")
    console.print(
        f"  time           {stage['hours']:.3g} h for {stage['max_steps']:,} steps, {stage['tokens']:.3g} tokens "
        f"({stage['step_s']:.3g} s a step at an assumed MFU of {plan['mfu']:g}; communication is not in it)"
    )
    console.print(_memory_table(stage))
    for note in stage["notes"]:
        console.print(f"  {note}", style="dim")


def _memory_table(stage: Mapping[str, Any]) -> Table:
    other = stage["strategies"][0]["other_checkpointing"]["gradient_checkpointing"]
    title = f"GiB a GPU at the peak, gradient checkpointing {'off' if other else 'on'}"
    table = Table(title=title, title_justify="left")
    for name in ("strategy", "weights", "gradients", "optimizer", "buffers", "activations", "logits", "teacher"):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for name in ("total", "peak at", "largest micro-batch", f"checkpointing {'on' if other else 'off'}", "GB a step", "s"):
        table.add_column(name, justify="left" if name == "peak at" else "right")
    for row in stage["strategies"]:
        table.add_row(*_cells(row), style="bold" if row["chosen"] else "")
    table.caption = (
        "weights with autocast's 16-bit copies; optimizer with master weights; bold: the recipe's; red: does not fit; "
        "GB a step and s: what one GPU exchanges, and how long that takes by itself"
    )
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    gib, other = row["gib"], row["other_checkpointing"]
    parts = [
        gib["weights"] + gib["weight_copies"],
        gib["gradients"] + gib["update"],
        gib["master_weights"] + gib["optimizer"],
        gib["buffers"],
        gib["activations"],
        gib["logits"],
        gib["teacher"],
    ]
    away = "".join(f" +{gib[place]:.1f} {place}" for place in ("host", "nvme") if gib[place])
    total = f"{gib['total']:.2f}"
    return [
        ("* " if row["chosen"] else "") + row["strategy"],
        *(f"{part:.2f}" if part else "-" for part in parts),
        (total if row["fits"] else f"[red]{total}[/red]") + away,
        row["peak_at"],
        str(row["largest_micro_batch"] or "none"),
        f"{other['total_gib']:.2f}, {other['largest_micro_batch'] or 'none'}",
        f"{row['communication']['gb_per_step']:.3g}",
        f"{row['communication']['s_per_step']:.2g}",
    ]


def _show_probe(console: Console, probe: Mapping[str, Any]) -> None:
    table = Table(title=f"Probe of {probe['stage']} on {probe['device']}: {probe['what']}", title_justify="left")
    for name in ("part", "predicted MiB", "measured MiB", "error"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in probe["parts"]:
        predicted, measured = part["predicted_bytes"], part["measured_bytes"]
        table.add_row(part["part"], f"{predicted / 2**20:,.2f}", f"{measured / 2**20:,.2f}", f"{part['error']:+.1%}")
    console.print(table)


if __name__ == "__main__":
    stage_main("plan")

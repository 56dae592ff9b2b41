"""The `plan` verb: parameters, memory a GPU, time and communication of a recipe's training stages, before any of them
runs. The formulas are in `planning`; here they are put together, shown and written. `--probe` measures what they say.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from trainer.__main__ import stage_main
from trainer.artifact import write_json
from trainer.config import EngineConfig, Recipe, nearest_multiples
from trainer.errors import UserError
from trainer.planning.case import Case, case_of
from trainer.planning.cost import (
    flops_per_token,
    forward_flops_per_token,
    recomputed_flops_per_token,
    step_seconds,
    traffic,
)
from trainer.planning.hardware import GPUS, Gpu
from trainer.planning.memory import Strategy, footprint, largest_micro_batch, standard_strategies, strategy_of
from trainer.planning.workload import Workload, workloads

_GIB = 2.0**30
_WIDTH = 130  # of the tables where no terminal says its own


def run(
    recipe: Recipe, *, gpus: int, gpu: str, mfu: float, probe: bool = False, json: Path | None = None
) -> dict[str, Any]:
    """Print the plan of each training stage for `gpus` of type `gpu`, and write it to `json`; returns what it wrote."""
    if gpus < 1 or not 0 < mfu <= 1:
        raise UserError(f"--gpus {gpus}, --mfu {mfu}", "at least one GPU, and a share of its peak above 0 and up to 1")
    plan: dict[str, Any] = {"run_dir": str(recipe.run_dir), "gpu": asdict(GPUS[gpu]), "gpus": gpus, "mfu": mfu}
    plan["stages"] = [plan_stage(workload, GPUS[gpu], gpus, mfu) for workload in workloads(recipe)]
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    for stage in plan["stages"]:
        _show(console, stage, plan)
    if probe:
        from trainer.planning.probe import probe as measure  # torch, which a login node may lack

        plan["probe"] = measure(recipe)
        console.print(_probe_table(plan["probe"]))
        _notes(console, plan["probe"]["notes"])
    if json is not None:
        write_json(json, plan)
    return plan


def plan_stage(workload: Workload, gpu: Gpu, gpus: int, mfu: float) -> dict[str, Any]:
    """All numbers of one stage, in the form that goes to the JSON."""
    training, shape, length = workload.training, workload.shape, workload.data.sequence_length
    counts = shape.parameters()
    case, notes = case_of(workload, gpu)
    at_once = training.micro_batch_size * gpus
    accumulation = max(1, training.global_batch_size // at_once)
    if training.global_batch_size % at_once:
        near = nearest_multiples(training.global_batch_size, at_once)
        batch = f"global_batch_size {training.global_batch_size} does not divide over {gpus} GPU(s) x "
        notes += (f"{batch}micro_batch_size {training.micro_batch_size}; nearest: {near}",)
    flops = flops_per_token(shape, length, workload.target_share)
    again = recomputed_flops_per_token(shape, length) if training.gradient_checkpointing else 0.0
    teacher = forward_flops_per_token(workload.teacher, length, workload.target_share) if workload.teacher else 0.0
    step_s = step_seconds((flops + teacher) * workload.step_tokens, gpus, gpu, training.precision, mfu)
    return {
        "stage": workload.stage,
        "architecture": shape.architecture,
        "sizes": {"layers": shape.layers, "hidden": shape.hidden, "heads": shape.heads, "vocabulary": shape.vocabulary},
        "parameters": counts.total,
        "multiplying_parameters": counts.multiplying,
        "teacher_parameters": workload.teacher.parameters().total if workload.teacher else None,
        "precision": training.precision,
        "sequence_length": length,
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": training.global_batch_size,
        "accumulation": accumulation,
        "tokens_per_step": workload.step_tokens,
        "target_share": workload.target_share,
        "gradient_checkpointing": training.gradient_checkpointing,
        "cross_entropy": case.batch.cross_entropy,
        "dense_attention_mask": case.batch.mask_elements > 0,
        "flops_per_token": flops,
        "flops_per_token_all_targets": flops_per_token(shape, length),
        "recomputed_flops_per_token": again,
        "teacher_flops_per_token": teacher,
        "max_steps": training.max_steps,
        "tokens": workload.step_tokens * training.max_steps,
        "step_s": step_s,
        "hours": step_s * training.max_steps / 3600,
        "strategies": [
            strategy_row(case, strategy, gpu, gpus, accumulation) | {"chosen": chosen}
            for strategy, chosen in strategies(training.engine)
        ],
        "notes": [*workload.notes, *notes],
    }


def strategies(engine: EngineConfig) -> list[tuple[Strategy, bool]]:
    """What the table compares, and which of it the recipe takes; its own DeepSpeed JSON stands for the shipped one."""
    standard = standard_strategies()
    if engine.zero is None:
        wanted = "ddp" if engine.strategy == "auto" else engine.strategy  # deepspeed: its JSON is the launcher's
        return [(one, one.name.split(" ")[0] == wanted) for one in standard]
    own = strategy_of(engine.zero)
    rows = [(own, True) if one.name == own.name else (one, False) for one in standard]
    return rows if (own, True) in rows else [*rows, (own, True)]


def strategy_row(case: Case, strategy: Strategy, gpu: Gpu, gpus: int, accumulation: int) -> dict[str, Any]:
    """One strategy: GiB by part at the peak, what fits, what is exchanged."""
    peak = footprint(case, gpus, strategy)
    moved = traffic(case.shape.parameters().total, gpus, strategy, case.precision, accumulation, gpu)
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
    both = {on: case.with_checkpointing(on) for on in (False, True)}
    return {
        "strategy": strategy.name,
        "gib": {name: value / _GIB for name, value in parts.items()},
        "peak_at": peak.moment,
        "fits": peak.total <= gpu.usable_bytes,
        "total_gib": {_onoff(on): footprint(one, gpus, strategy).total / _GIB for on, one in both.items()},
        "largest_micro_batch": {
            _onoff(on): largest_micro_batch(one, gpus, strategy, gpu.usable_bytes) for on, one in both.items()
        },
        "exchanged_gb_per_step": (moved.ring_bytes + moved.node_bytes) / 1e9,
        "exchange_s_per_step": moved.seconds,
    }


def _onoff(checkpointing: bool) -> str:
    return f"checkpointing_{'on' if checkpointing else 'off'}"


def _show(console: Console, stage: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    gpu = plan["gpu"]
    sizes = ", ".join(f"{name} {value}" for name, value in stage["sizes"].items())
    teacher = f"; teacher {stage['teacher_parameters']:,}" if stage["teacher_parameters"] else ""
    exchange = max((row["exchange_s_per_step"] for row in stage["strategies"] if row["chosen"]), default=0.0)
    lines = {
        "parameters": f"{stage['parameters']:,} ({sizes}){teacher}",
        "step": f"{stage['tokens_per_step']:,} tokens: {stage['global_batch_size']} rows of "
        f"{stage['sequence_length']}, {stage['accumulation']} x {stage['micro_batch_size']} rows on each GPU",
        "FLOPs a token": f"{stage['flops_per_token']:.4g}: 6 N + 12 L D T, the output matrix at targets only "
        f"({stage['flops_per_token_all_targets']:.4g} at all tokens){_more_flops(stage)}",
        "time": f"{_duration(stage['hours'])} for {stage['max_steps']:,} steps, {stage['tokens']:.3g} tokens: "
        f"{stage['step_s']:.3g} s a step at {plan['mfu']:.0%} of the peak (assumed), "
        f"up to {exchange:.2g} s more where nothing hides communication",
    }
    where = f"{plan['gpus']} x {gpu['name']} ({gpu['memory_gb']:g} GB)"
    console.print(f"\n[bold]{stage['stage']}[/bold]: {stage['architecture']}, {stage['precision']}, on {where}")
    for name, line in lines.items():
        console.print(f"  {name:<14} {line}", soft_wrap=True)
    _notes(console, stage["notes"])
    console.print(_memory_table(stage))
    console.print(_choice_table(stage))


def _notes(console: Console, notes: Iterable[str]) -> None:
    for note in notes:
        console.print(f"  {note}", style="dim", markup=False, soft_wrap=True)


def _more_flops(stage: Mapping[str, Any]) -> str:
    more = {"recomputation": stage["recomputed_flops_per_token"], "the teacher": stage["teacher_flops_per_token"]}
    return "".join(f"; {flops:.3g} more for {what}" for what, flops in more.items() if flops)


def _duration(hours: float) -> str:
    return f"{hours * 3600:.3g} s" if hours < 1 / 60 else f"{hours * 60:.3g} min" if hours < 2 else f"{hours:.4g} h"


def _memory_table(stage: Mapping[str, Any]) -> Table:
    on = stage["gradient_checkpointing"]
    columns = ["weights", "gradients", "optimizer", "buffers", "activations", "logits", "teacher", "total", "host"]
    table = _table(f"GiB a GPU at the peak, gradient checkpointing {'on' if on else 'off'}", columns, "peak at")
    for row in stage["strategies"]:
        gib = row["gib"]
        parts = [
            gib["weights"] + gib["weight_copies"],
            gib["gradients"] + gib["update"],
            gib["master_weights"] + gib["optimizer"],
            *(gib[name] for name in ("buffers", "activations", "logits", "teacher")),
        ]
        total = f"{gib['total']:.2f}" + ("" if row["fits"] else " !")
        cells = [f"{part:.2f}" if part else "-" for part in parts]
        cells += [total if row["fits"] else f"[red]{total}[/red]", f"{gib['host'] + gib['nvme']:.1f}"]
        table.add_row(_name(row), *cells, row["peak_at"], style="bold" if row["chosen"] else "")
    table.caption = (
        "weights with autocast's 16-bit copies, optimizer with master weights, host: in the node's memory or on its "
        "NVMe; *: the recipe's; !: does not fit"
    )
    return table


def _choice_table(stage: Mapping[str, Any]) -> Table:
    columns = ["micro-batch, off", "micro-batch, on", "GiB, off", "GiB, on", "GB a step", "s a step"]
    table = _table("With gradient checkpointing off and on: largest micro-batch that fits, total; exchange", columns)
    for row in stage["strategies"]:
        largest, total = row["largest_micro_batch"], row["total_gib"]
        cells = [str(largest[_onoff(on)] or "none") for on in (False, True)]
        cells += [f"{total[_onoff(on)]:.2f}" for on in (False, True)]
        cells += [f"{row['exchanged_gb_per_step']:.3g}", f"{row['exchange_s_per_step']:.2g}"]
        table.add_row(_name(row), *cells, style="bold" if row["chosen"] else "")
    return table


def _probe_table(probe: Mapping[str, Any]) -> Table:
    title = f"Probe on {probe['device']}, MiB: {probe['what']}"
    table = _table(title, ["predicted", "measured", "error"], first="part")
    for part in probe["parts"]:
        sizes = (f"{part[name] / 2**20:,.2f}" for name in ("predicted_bytes", "measured_bytes"))
        table.add_row(part["part"], *sizes, f"{part['error']:+.1%}")
    return table


def _table(title: str, numbers: list[str], last: str = "", first: str = "strategy") -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    if last:
        table.add_column(last, no_wrap=True)
    return table


def _name(row: Mapping[str, Any]) -> str:
    return ("* " if row["chosen"] else "  ") + row["strategy"]


if __name__ == "__main__":
    stage_main("plan")

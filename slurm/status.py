"""The `status` verb: each job of a run folder, how far its stage is, how often it started, and its last words.
States come from SLURM, steps from metrics.jsonl; nothing here changes anything."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slurm import commands
from slurm.grid import element_dir
from slurm.ledger import Ledger
from slurm.submit import STAGES
from trainer.config import Recipe
from trainer.errors import UserError
from trainer.recipe_file import load_recipe

_LAST_LINES = 3
_LAST_BYTES = 65536  # enough of a log or of metrics.jsonl to hold its last lines


def run(run_dir: Path) -> None:
    """Print one row a job, the last lines of its log, and for an array the results by element."""
    ledger = Ledger.read(run_dir / "slurm")
    if not ledger.jobs:
        raise UserError(f"nothing was submitted for {run_dir}", "a run folder with a slurm/jobs.json", "lmworks submit")
    console = Console(width=max(120, Console().width), highlight=False)
    console.print(_jobs(run_dir, ledger))
    for stage in ledger.jobs:
        for log in ledger.logs(stage):
            console.print(f"{stage}: {log}", markup=False, soft_wrap=True)
            for line in last_lines(log)[-_LAST_LINES:]:
                console.print(f"  {line}", markup=False, soft_wrap=True)
    if ledger.elements:
        console.print(_results(run_dir, ledger.elements))


def progress(run_dir: Path, stage: str, recipe: Recipe) -> dict[str, Any]:
    """Step, steps in all, loss and seconds left of a stage that trains; nothing before its first report."""
    section = getattr(recipe, stage, None)
    steps = getattr(section, "total_steps", getattr(section, "max_steps", None))
    path = run_dir / stage / "metrics.jsonl"
    if steps is None or not path.is_file():
        return {}
    rows = [row for line in last_lines(path) if (row := _row(line)) and row["event"] == "train"]
    if not rows:
        return {}
    last = rows[-1]
    left_s = (steps - last["step"]) * last["step_time_s"]
    return {"step": last["step"], "steps": steps, "loss": last["loss"], "left_s": round(left_s)}


def last_lines(path: Path) -> list[str]:
    """The last whole lines of a file that is being written."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LAST_BYTES))
        return file.read().decode("utf-8", errors="replace").splitlines()


def _row(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:  # the first line of the piece that was read, or one that is being written
        return None


def _jobs(run_dir: Path, ledger: Ledger) -> Table:
    table = Table("stage", "job", "state", "why", "nodes", "restarts", "step", "loss", "left")
    recipe = None if ledger.elements else load_recipe(str(run_dir / "slurm" / "recipe.yaml"))
    for stage, job in ledger.jobs.items():
        known = commands.show(job) or commands.accounted(job)
        facts = known[-1] if known else {}
        at = progress(run_dir, stage, recipe) if recipe else {}
        reason = facts.get("Reason", "")
        table.add_row(
            stage,
            job,
            _states(known),
            "" if reason == "None" else reason,
            facts.get("NodeList", "").replace("(null)", ""),
            facts.get("Restarts", ""),
            f"{at['step']}/{at['steps']}" if at else "",
            f"{at['loss']:.4g}" if at else "",
            f"{at['left_s']} s" if at else "",
        )
    return table


def _states(known: Sequence[dict[str, str]]) -> str:
    """One state, or how many elements are in which."""
    counted = Counter(facts["JobState"] for facts in known)
    if len(known) > 1:
        return ", ".join(f"{number} {state}" for state, number in counted.items())
    return next(iter(counted), "forgotten by SLURM")


def _results(run_dir: Path, names: Sequence[str]) -> Table:
    """The last validation of every element; also written to array.csv."""
    rows = [result(element_dir(run_dir, number)) for number in range(len(names))]
    columns = sorted({key for row in rows for key in row})
    table = Table("element", *columns)
    text = [",".join(["element", *columns])]
    for name, row in zip(names, rows, strict=True):
        values = [str(row.get(column, "")) for column in columns]
        table.add_row(name, *values)
        text.append(",".join([re.sub(r"[,\"\n]", " ", name), *values]))
    (run_dir / "array.csv").write_text("\n".join(text) + "\n", encoding="utf-8")
    return table


def result(run_dir: Path) -> dict[str, Any]:
    """What the stages that train saw in their last validation, `<stage>.<number>` to value."""
    found = {}
    for stage in STAGES:
        path = run_dir / stage / "metrics.jsonl"
        rows = [row for line in last_lines(path) if (row := _row(line))] if path.is_file() else []
        validations = [row for row in rows if row["event"] == "eval"]
        if validations:
            found |= {f"{stage}.{name}": value for name, value in validations[-1].items() if name in ("step", "loss")}
    return found

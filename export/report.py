"""The report stage: one self-contained HTML page, pictures, summary.json and model cards from what was measured.
Reading the run folder is `results`' work, drawing `plots`', the cards' text `card`'s; no number is made here.
"""

import base64
import os
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console

from export.card import write_cards
from export.plots import LOWER_IS_BETTER, draw_all, pareto_front, quality_points
from export.results import (
    STAGES,
    Results,
    Row,
    Trained,
    is_verified,
    measured,
    noise_of,
    parity_of,
    quality_text,
    rank_of,
    read_results,
    summarize,
)
from trainer.__main__ import stage_main
from trainer.artifact import staging, write_json, write_text
from trainer.config import Recipe
from trainer.environment import launch_command
from trainer.export_config import ONNX_FILES
from trainer.recipe_file import dump_recipe

TEMPLATES = Path(__file__).parent / "templates"
_SHORT_HASH = 12
_ONNX = " as ONNX"
_NOT_MEASURED = "–"


def run(recipe: Recipe) -> None:
    """Write report.html, plots/, summary.json and the model cards of `recipe`'s run folder, and say the result.

    Raises UserError if no stage has left anything yet. Stages that did not run are named in the report.
    """
    found = read_results(recipe)
    summary = summarize(found)
    with staging(recipe.run_dir / "plots") as partial:
        names = [path.name for path in draw_all(found, partial).values()]
    pictures = {Path(name).stem: recipe.run_dir / "plots" / name for name in names}
    write_json(recipe.run_dir / "summary.json", summary)
    page = recipe.run_dir / "report.html"
    write_text(page, render(found, summary, pictures))
    kept = write_cards(found)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for line in summary_lines(summary):
        console.print(line)
    for path in kept:
        console.print(f"left as it is, because it was not written by lmworks: {path}")
    console.print(str(page))


def render(found: Results, summary: Row, pictures: dict[str, Path]) -> str:
    """The page as HTML; `pictures` (name to PNG file) are written into it."""
    inlined = {name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()}
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= {
        "number": number,
        "percent": percent,
        "duration": duration,
        "short": short,
        "measured": measured,
        "limit": limit,
    }
    points = quality_points(found)
    return environment.get_template("report.html").render(
        found=found,
        summary=summary,
        pictures=inlined,
        headline=headline(summary),
        absent=absent(found),
        lineage=lineage(found),
        trained=[describe_training(one) for one in found.trained.values()],
        evaluations=evaluation_columns(found),
        proofs=list(proofs(found)),
        rows=describe_rows(found),
        noise=noise_of(found),
        reasons=reasons(found),
        placed=placed(found),
        front={(point["model"], point["backend"]) for point in pareto_front(points, noise_of(found) or 0.0)},
        commands=commands(found),
        environments=environments(found),
        recipe=dump_recipe(found.recipe),
    )


# ---- what the page says ----------------------------------------------------------------------------------------


def headline(summary: Row) -> list[tuple[str, str, str]]:
    """The large figures: name, value, what it means."""
    shape = f"batch {summary['batch_size']} × {summary['sequence_length']} tokens"
    shaky = "" if summary["stable"] in (True, None) else " · unstable, not to be relied on"
    parameters = [count(summary[f"{name}_parameters"]) for name in STAGES]
    timed = summary["batch_size"] is not None
    speed_up = f"{summary['speedup']:.1f}×" if summary["speedup"] else _NOT_MEASURED
    speed_up += " (within the noise)" if summary["tied"] else ""
    backend = (summary["student_backend"] or "no verified backend").replace("_", " ")
    if summary["tied_backends"]:
        backend += f" (tied with {', '.join(summary['tied_backends'])})".replace("_", " ")
    parity = {True: "passed", False: "missing or outdated", None: "not checked"}[summary["parity_passed"]]
    tiles = [
        ("Speed-up", speed_up, f"student in {backend} against teacher in eager PyTorch, {shape}{kept(summary)}{shaky}"),
        ("Median latency", _pair(summary, "latency_ms", " ms"), f"teacher eager → student {backend}, {shape}{shaky}"),
        ("Validation loss", _pair(summary, "loss", ""), "teacher → student, nats per target token"),
        ("Parameters", " → ".join(parameters), "teacher → student" + share(summary, "parameters")),
        (
            "Size on disk",
            _pair(summary, "mib", " MiB"),
            f"teacher in PyTorch → student {backend}{share(summary, 'mib')}",
        ),
        ("Parity of exports", parity, "every ONNX file held against its source model on real text"),
    ]
    return [tile for tile in tiles if timed or tile[0] not in ("Speed-up", "Median latency", "Size on disk")]


def summary_lines(summary: Row) -> list[str]:
    """The lines that a terminal shows, of five those for which anything was measured."""
    texts = {name: (value, note) for name, value, note in headline(summary)}
    rows = (("loss", "Validation loss"), ("parameters", "Parameters"), ("latency", "Median latency"),
            ("speed-up", "Speed-up"), ("size", "Size on disk"))  # fmt: skip
    return [
        f"{label:<11} {texts[name][0]}  ({texts[name][1]})"
        for label, name in rows
        if name in texts and set(texts[name][0]) - set("– →")
    ]


def absent(found: Results) -> list[str]:
    """What this page cannot show, and why."""
    asked, done = found.recipe, found.trained
    notes = []
    for stage, is_there in (
        ("prepare", found.manifest is not None),
        ("pretrain", "teacher" in done),
        ("distill", "student" in done),
        ("export", bool(found.exported)),
        ("bench", found.bench is not None),
    ):
        if not is_there:
            why = (
                "the recipe has no such section" if getattr(asked, stage) is None else "it has not run, or not finished"
            )
            notes.append(f"{stage}: {why}, so its part is left out.")
    for one in done.values():
        if one.artifact is None:
            notes.append(f"{one.stage}: not finished; what is shown ends at its last logged step.")
        if one.metrics.unreadable:
            notes.append(f"{one.stage}: {one.metrics.unreadable} half-written line(s) of its log left out.")
    if (
        found.bench is not None
        and found.bench["rows"]
        and not any(row["status"] == "ok" for row in found.bench["rows"])
    ):
        notes.append("bench: no row is stable; its latencies must not be relied on.")
    if found.bench is not None and "rates" not in found.bench:
        notes.append("bench: measured by an older lmworks, without limits and generating; to see them run bench again.")
    if found.bench is not None and noise_of(found) is None:
        why = found.bench.get("noise", {}).get("reason") or "this report does not hold it"
        notes.append(
            f"bench: nothing was measured twice ({why}), so rows are not ranked; to rank them run bench again."
        )
    return notes


def lineage(found: Results) -> list[Row]:
    """Every artifact of the run with its content hash, and what it was made from: name, hash, and whether that very
    content still lies in this run folder (`here`), was given by path (`given`) or is there no more (`gone`).
    An export also names the model that it is `of`."""
    known = dict(_artifacts(found))
    hashes = {record["content_sha256"] for record in known.values()}
    steps = []
    for name, record in known.items():
        parents = [
            {"name": parent, "sha256": digest, "where": "here" if digest in hashes else _whence(found, name, parent)}
            for parent, digest in record["parents"].items()
        ]
        parameters = record["about"].get("parameters")
        steps.append(
            {
                "name": name,
                "of": name.removesuffix(_ONNX) if name.endswith(_ONNX) else "",
                "sha256": record["content_sha256"],
                "note": f"{count(parameters)} parameters" if parameters else "",
                "parents": parents,
            }
        )
    return steps


def _artifacts(found: Results) -> Iterator[tuple[str, Row]]:
    named = {"tokenizer": found.tokenizer, "token shards": found.data}
    named |= {name: one.artifact for name, one in found.trained.items()}
    named |= {name + _ONNX: record for name, record in found.exported.items()}
    return ((name, record) for name, record in named.items() if record is not None)


def _whence(found: Results, name: str, parent: str) -> str:
    recipe = found.recipe
    given = {
        ("teacher", "init_from"): True,
        ("student", "teacher"): recipe.distill is not None and recipe.distill.teacher is not None,
    }
    if parent == "model" and recipe.export is not None:
        given[name, parent] = recipe.export.models.get(name.removesuffix(_ONNX)) is not None
    return "given" if given.get((name, parent)) else "gone"


def describe_training(one: Trained) -> Row:
    """One stage's row of the training table."""
    steps = [row["step"] for row in (*one.metrics.train, *one.metrics.eval)]
    about = one.artifact["about"] if one.artifact else {}
    rows = one.metrics.train
    return {
        "name": one.name,
        "stage": one.stage,
        "finished": one.artifact is not None,
        "parameters": about.get("parameters"),
        "architecture": about.get("architecture"),
        "steps": max(steps, default=None),
        "tokens": rows[-1]["tokens"] if rows else None,
        "tokens_per_s": _median([row["tokens_per_s"] for row in rows if row.get("tokens_per_s") is not None]),
        "mfu": _median([row["mfu"] for row in rows if row.get("mfu") is not None]),
        "peak_memory_gib": max((row["peak_memory_gib"] for row in rows if row.get("peak_memory_gib")), default=None),
        "seconds": one.metrics.seconds,
        "resumed_at": one.metrics.resumed_at,
        "device": one.launch.get("device"),
        "ranks": one.launch.get("ranks"),
    }


def evaluation_columns(found: Results) -> Row:
    """Last evaluation of each trained model: metric names in order, and a mapping of them for each model."""
    last = {name: one.metrics.eval[-1] for name, one in found.trained.items() if one.metrics.eval}
    skipped = ("event", "step", "tokens")
    names = dict.fromkeys(key for row in last.values() for key in row if key not in skipped)
    return {"metrics": list(names), "models": last}


def proofs(found: Results) -> Iterator[Row]:
    """Evidence of both gates of every exported file, with the verdict."""
    for model, record in found.exported.items():
        for backend in ONNX_FILES:
            if (model, backend) not in found.verified:
                continue
            variant = backend.removeprefix("onnx_")
            entries = {entry["what"]: entry for entry in record["evidence"]}
            proof = parity_of(record, backend)
            metrics, limits = proof.get("metrics", {}), proof.get("thresholds", {})
            yield {"model": model, "backend": backend, "passed": found.verified[model, backend], "metrics": metrics,
                   "limits": limits, "quality": quality_text(entries.get(f"quality_{variant}"))}  # fmt: skip


def reasons(found: Results) -> dict[str, list[str]]:
    """Why benchmark rows are not ok: each reason once, with the status and the models and backends it is about."""
    about: dict[str, list[str]] = {}
    for row in found.bench["rows"] if found.bench else []:
        who = f"{row['model']} {row['backend'].replace('_', ' ')} {row['status']}"
        if row["status"] != "ok" and who not in about.setdefault(row.get("reason") or "no reason was recorded", []):
            about[row.get("reason") or "no reason was recorded"].append(who)
    return about


def describe_rows(found: Results) -> list[Row]:
    """Benchmark rows with what the table adds: the shape as text, whether parity was shown, the place by latency."""
    rows = []
    for row in found.bench["rows"] if found.bench else []:
        place, tied = rank_of(found, row) or (None, False)
        shape = f"{row['batch_size']} × {row['sequence_length']}" + (" real" if row.get("lengths") == "real" else "")
        rank = "" if place is None else f"{place}, tied" if tied else str(place)
        rows.append(row | {"verified": is_verified(found, row), "shape": shape, "rank": rank})
    return rows


def placed(found: Results) -> list[str]:
    """Where ONNX Runtime ran the nodes of each graph that was measured."""
    nodes = {
        (row["model"], row["backend"]): row["nodes"]
        for row in (found.bench or {"rows": []})["rows"]
        if row.get("nodes")
    }
    return [
        f"{model} {backend.replace('_', ' ')}: " + ", ".join(f"{count} on {name}" for name, count in counts.items())
        for (model, backend), counts in nodes.items()
    ]


def commands(found: Results) -> list[tuple[str, str]]:
    """What to type to get each group of numbers again."""
    bench = found.bench["command"] if found.bench else None
    exported = [entry["command"] for record in found.exported.values() for entry in record["evidence"]]
    launched = {one.stage: one.launch.get("command") for one in found.trained.values()}
    listed = [("tokenizer, token shards, their counts", "prepare", None, found.data is not None)]
    listed += [
        (f"loss, throughput, memory and evaluation of the {name}", stage, launched.get(stage), name in found.trained)
        for name, stage in STAGES.items()
    ]
    listed += [
        ("parity of the exported files", "export", next(iter(exported), None), bool(found.exported)),
        ("latency, throughput, memory, size, quality", "bench", bench, found.bench is not None),
        ("this report, summary.json and the model cards", "report", None, True),
    ]
    return [(what, stage_command(found, verb, recorded)) for what, verb, recorded, shown in listed if shown]


def stage_command(found: Results, verb: str, recorded: str | None) -> str:
    """The command of one stage: the recorded one, with the stage's own verb where the whole chain was run.

    A record that names no recipe is completed with this process's own arguments, or else with the resolved recipe
    that a training stage left in the run folder.
    """
    words = shlex.split(recorded or "")
    if words[:2] == ["lmworks", "run"]:
        words[1] = verb
    if len(words) > 2:
        return shlex.join(words)
    return shlex.join(["lmworks", verb, *(_own_arguments() or [_saved_recipe(found)])])


def _own_arguments() -> list[str]:
    words = shlex.split(launch_command())
    if words[0] == "lmworks":
        return words[2:]
    return words[3:] if words[:3] == ["python", "-m", "export.report"] else []


def _saved_recipe(found: Results) -> str:
    saved = [found.recipe.stage_dir(stage) / "recipe.yaml" for stage in STAGES.values()]
    return next((os.path.relpath(path) for path in saved if path.is_file()), "RECIPE")


def environments(found: Results) -> list[tuple[str, Row]]:
    """Where each stage ran: its name and flat pairs of what was recorded."""
    places = [(one.stage, _flat(one.environment)) for one in found.trained.values() if one.environment]
    if found.bench:
        places.append(("bench", _flat(found.bench["machine"] | {"versions": found.bench["versions"]})))
    return places


def _flat(tree: Any, prefix: str = "") -> Row:
    if isinstance(tree, list):
        tree = {str(index): value for index, value in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{prefix} {name}".strip()).items()}


# ---- numbers as text -------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 4) -> str:
    """Four significant digits, thousands separated; a dash for what was not measured."""
    if value is None:
        return _NOT_MEASURED
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def count(value: int | None) -> str:
    """A count in thousands, millions or billions with three digits, such as `11.2 M`."""
    if value is None:
        return _NOT_MEASURED
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:#.3g} {unit}".replace(". ", " ")
    return str(value)


def percent(value: float | None) -> str:
    return _NOT_MEASURED if value is None else f"{value:.1%}"


def limit(row: Row) -> str:
    """The share of the machine's limit that a benchmark row reaches, and which limit; a dash where not known."""
    found = measured(row, "limit_share")
    return _NOT_MEASURED if found is None else f"{found:.0%} {row['limit']}"


def duration(seconds: float | None) -> str:
    """Seconds as `1 h 02 min`, `3 min 20 s` or `4.2 s`."""
    if seconds is None:
        return _NOT_MEASURED
    minutes = int(seconds // 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {seconds % 60:02.0f} s" if minutes else f"{seconds:.1f} s"


def short(sha256: str) -> str:
    return sha256[:_SHORT_HASH]


def share(summary: Row, figure: str) -> str:
    """The student's part of the teacher's figure, as a remark."""
    teacher, student = (summary[f"{name}_{figure}"] for name in STAGES)
    return f" ({student / teacher:.0%})" if teacher and student is not None else ""


def kept(summary: Row) -> str:
    """What the student keeps of the teacher's quality, as a remark."""
    quality = summary["quality"] or {}
    teacher, student = quality.get("teacher"), quality.get("student")
    if not teacher or student is None:
        return ""
    name = quality["metric"].replace("_", " ")
    if quality["metric"] in LOWER_IS_BETTER:
        return f", {name} {number(teacher)} → {number(student)}"
    return f", at {student / teacher:.1%} of its {name}"


def _pair(summary: Row, figure: str, unit: str) -> str:
    values = [number(summary[f"{name}_{figure}"], 3) for name in STAGES]
    return " → ".join(values) + (unit if set(values) != {_NOT_MEASURED} else "")


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


if __name__ == "__main__":
    stage_main("report")

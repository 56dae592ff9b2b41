"""Reads a run folder: what each stage measured, and the figures that are drawn from it.
How they are shown is left to `report`, `plots` and `card`; nothing here is written, and nothing absent is made up."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.files import is_the_one
from export.io_spec import exported_stems, graph_files
from export.noise import difference, rank
from trainer.artifact import ARTIFACT_FILE, content_hash, read_artifact
from trainer.config import Recipe
from trainer.errors import UserError
from trainer.export_config import ENGINES, ONNX_FILES

Row = dict[str, Any]
STAGES = {"teacher": "pretrain", "student": "distill"}
_SOURCE_BACKENDS = ("eager", "compile")  # torch itself; the others need evidence of parity


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl without what later attempts did again. `unreadable` counts lines that a crash cut short."""

    train: list[Row] = field(default_factory=list)
    eval: list[Row] = field(default_factory=list)
    seconds: float | None = None  # wall time of the last attempt
    resumed_at: tuple[int, ...] = ()
    unreadable: int = 0


@dataclass(frozen=True)
class Trained:
    """One training stage: its metrics, and what it said about itself."""

    name: str
    stage: str
    metrics: Metrics
    artifact: Row | None
    environment: Row
    launch: Row


@dataclass(frozen=True)
class Results:
    """All that a run folder holds. Parts that are not there are None or empty."""

    name: str
    recipe: Recipe
    manifest: Row | None
    data: Row | None
    tokenizer: Row | None
    trained: dict[str, Trained]
    exported: dict[str, Row]
    verified: dict[tuple[str, str], bool]  # (model, backend) of each ONNX form that is there
    bench: Row | None
    chain: Row


def read_results(recipe: Recipe) -> Results:
    """Read the run folder of `recipe`; UserError if no stage has left anything there."""
    folder = recipe.run_dir
    export = recipe.stage_dir("export")
    folders = [path.parent for path in sorted(export.glob(f"*/{ARTIFACT_FILE}"))]
    names = sorted((folder.name for folder in folders), key=lambda name: [*STAGES, name].index(name))
    exported = {name: read_artifact(export / name) for name in names}
    found = Results(
        name=folder.resolve().name,
        recipe=recipe,
        manifest=_json(recipe.data_dir / "manifest.json"),
        data=_artifact(recipe.data_dir),
        tokenizer=_artifact(recipe.tokenizer_dir),
        trained={name: one for name, stage in STAGES.items() if (one := _trained(recipe, name, stage))},
        exported=exported,
        verified={pair: good for name, record in exported.items() for pair, good in _proofs(recipe, name, record)},
        bench=_bench(recipe),
        chain=(_json(folder / "chain.json") or {}).get("stages", {}),
    )
    if not (found.data or found.trained or found.exported or found.bench):
        raise UserError(f"{folder} has no results", "at least one finished stage", "lmworks run RECIPE")
    return found


def read_metrics(path: Path) -> Metrics:
    """metrics.jsonl in the order of steps; rows that a resumed or restarted attempt superseded are dropped."""
    rows, unreadable = _lines(path)
    kept: dict[tuple[str, int], Row] = {}
    seconds, resumed = None, []
    for row in rows:
        event, step = row["event"], row["step"]
        if event == "start":
            kept, seconds, resumed = {}, None, []
        elif event == "resume":
            kept, seconds = {key: old for key, old in kept.items() if key[1] <= step}, None
            resumed.append(step)
        elif event == "end":
            seconds = row["seconds"]
        else:
            kept[event, step] = row
    ordered = [kept[key] for key in sorted(kept, key=lambda key: key[1])]
    return Metrics(
        train=[row for row in ordered if row["event"] == "train"],
        eval=[row for row in ordered if row["event"] == "eval"],
        seconds=seconds,
        resumed_at=tuple(resumed),
        unreadable=unreadable,
    )


def summarize(found: Results) -> Row:
    """The figures of summary.json; None for everything that was not measured."""
    speeds = _speeds(found)
    verified = found.verified.values()
    return {
        "teacher_loss": _loss(found, "teacher"),
        "student_loss": _loss(found, "student"),
        "teacher_parameters": _parameters(found, "teacher"),
        "student_parameters": _parameters(found, "student"),
        **speeds,
        "parity_passed": all(verified) if verified else None,
        "seconds": _seconds(found),
        "teacher_mib": _of(_model_row(found, "teacher", "eager"), "file_mib"),
        "student_mib": _of(_model_row(found, "student", speeds["student_backend"]), "file_mib"),
        "quality": _quality(found, speeds["student_backend"]),
    }


def rows_at(found: Results, model: str, batch_size: int, sequence_length: int) -> list[Row]:
    """Benchmark rows of one model at one shape, of full rows, measured or not."""
    wanted = (model, batch_size, sequence_length)
    return [row for row in full_rows(found) if (row["model"], row["batch_size"], row["sequence_length"]) == wanted]


def full_rows(found: Results) -> list[Row]:
    """Benchmark rows without padding, which compare; those of real documents are of other batches."""
    return [row for row in (found.bench["rows"] if found.bench else []) if row.get("lengths", "full") == "full"]


def compared_shape(found: Results) -> tuple[int, int] | None:
    """The (batch, sequence) at which teacher and student are compared: the smallest batch, the longest sequence."""
    shapes = [(row["batch_size"], row["sequence_length"]) for row in full_rows(found)]
    return (min(batch for batch, _ in shapes), max(length for _, length in shapes)) if shapes else None


def is_verified(found: Results, row: Row) -> bool:
    """Whether the row's backend gives the model's own outputs: torch does, an ONNX file needs passed parity, and an
    engine both its graph's and its own (of two graphs, each)."""
    if row["backend"] in ENGINES:
        graph = found.verified.get((row["model"], f"onnx_{ENGINES[row['backend']]}"), False)
        engines = row.get("engines") or ()
        return graph and bool(engines) and all(engine["parity"] is not None for engine in engines)
    return row["backend"] in _SOURCE_BACKENDS or found.verified.get((row["model"], row["backend"]), False)


def measured(row: Row, column: str) -> float | None:
    """A figure of a benchmark row; None where the row was refused or failed, whatever it holds."""
    return row.get(column) if row["status"] in ("ok", "unstable") else None


def fastest(found: Results, rows: Iterable[Row]) -> Row | None:
    """The verified row of lowest median latency; an unstable one only where no stable one is."""
    timed = [row for row in rows if measured(row, "p50_ms") is not None and is_verified(found, row)]
    for status in ("ok", "unstable"):
        chosen = [row for row in timed if row["status"] == status]
        if chosen:
            return min(chosen, key=lambda row: row["p50_ms"])
    return None


def noise_of(found: Results) -> float | None:
    """What one and the same backend differed by from itself in this benchmark; None where that was not measured."""
    return (found.bench or {}).get("noise", {}).get("relative")


def rank_of(found: Results, row: Row) -> tuple[int, bool] | None:
    """The place of a row by latency among all of its shape, and whether others share it, within the noise.

    None for a row that is not stable and verified, and for all rows where the noise was not measured.
    """
    noise = noise_of(found)
    keys = ("batch_size", "sequence_length")
    others = [
        other
        for other in (found.bench["rows"] if found.bench else [])
        if other["status"] == "ok"
        and is_verified(found, other)
        and all(other[key] == row[key] for key in keys)
        and other.get("lengths", "full") == row.get("lengths", "full")
    ]
    if noise is None or row not in others:
        return None
    return rank(row["p50_ms"], [other["p50_ms"] for other in others], noise)


def _tied_with(found: Results, chosen: Row | None, rows: Iterable[Row]) -> list[str] | None:
    """Other backends whose verified, stable rows differ from the chosen one by no more than the noise."""
    noise = noise_of(found)
    if chosen is None or noise is None:
        return None
    others = [row for row in rows if row["status"] == "ok" and row is not chosen and is_verified(found, row)]
    return [row["backend"] for row in others if difference(row["p50_ms"], chosen["p50_ms"]) <= noise]


def _speeds(found: Results) -> Row:
    shape = compared_shape(found)
    teacher_rows, student_rows = ([], []) if shape is None else [rows_at(found, name, *shape) for name in STAGES]
    teacher = fastest(found, [row for row in teacher_rows if row["backend"] == "eager"])
    student = fastest(found, student_rows)
    measured = [row for row in (teacher, student) if row is not None]
    noise = noise_of(found)
    return {
        "teacher_latency_ms": _of(teacher, "p50_ms"),
        "student_latency_ms": _of(student, "p50_ms"),
        "speedup": teacher["p50_ms"] / student["p50_ms"] if teacher and student else None,
        "noise": noise,
        "tied": difference(teacher["p50_ms"], student["p50_ms"]) <= noise
        if teacher and student and noise is not None
        else None,
        "stable": all(row["status"] == "ok" for row in measured) if measured else None,
        "student_backend": _of(student, "backend"),
        "tied_backends": _tied_with(found, student, student_rows),
        "batch_size": shape[0] if shape else None,
        "sequence_length": shape[1] if shape else None,
        "threads": _of(student or teacher, "threads"),
        **{
            f"{name}_joules": row["joules_per_request"]
            for name, row in (("teacher", teacher), ("student", student))
            if _of(row, "joules_per_request") is not None and row is not None
        },
    }


def _quality(found: Results, student_backend: str | None) -> Row | None:
    """The task metric of the teacher in torch and of the student in its chosen backend."""
    entries = found.bench["quality"] if found.bench else []
    values = {(entry["model"], entry["backend"]): entry for entry in entries}
    teacher, student = values.get(("teacher", "eager")), values.get(("student", student_backend or ""))
    if teacher is None and student is None:
        return None
    metric = (teacher or student or {})["metric"]
    return {"metric": metric, "teacher": _of(teacher, "value"), "student": _of(student, "value")}


def quality_text(proof: Row | None) -> str:
    """What a form keeps of its source's quality, with the interval and what was asked for; a dash without evidence."""
    if proof is None:
        return "–"
    seen, share = proof["metrics"], proof["thresholds"]["share"]
    return (
        f"{seen['kept']:.1%} of {seen['metric'].replace('_', ' ')} ({seen['kept_low']:.1%} to {seen['kept_high']:.1%}) "
        f"[{share:.1%}]"
    )


def _loss(found: Results, name: str) -> float | None:
    trained = found.trained.get(name)
    return trained.metrics.eval[-1]["loss"] if trained and trained.metrics.eval else None


def _parameters(found: Results, name: str) -> int | None:
    trained = found.trained.get(name)
    about = trained.artifact["about"] if trained and trained.artifact else {}
    measured = (found.bench or {}).get("models", {}).get(name, {})
    return about.get("parameters", measured.get("parameters"))


def _seconds(found: Results) -> float | None:
    """Wall seconds of all stages: the chain's figures, and the stage's own where it did not run in a chain."""
    seconds = {trained.stage: trained.metrics.seconds for trained in found.trained.values()}
    seconds |= {stage: entry["seconds"] for stage, entry in found.chain.items()}
    known = [value for value in seconds.values() if value is not None]
    return sum(known) if known else None


def _model_row(found: Results, model: str, backend: str | None) -> Row | None:
    rows = found.bench["rows"] if found.bench else []
    return next((row for row in rows if (row["model"], row["backend"]) == (model, backend)), None)


def _of(row: Row | None, key: str) -> Any:
    return None if row is None else row.get(key)


def _trained(recipe: Recipe, name: str, stage: str) -> Trained | None:
    folder = recipe.stage_dir(stage)
    path, artifact = folder / "metrics.jsonl", _artifact(recipe.model_dir(stage))
    if not path.is_file() and artifact is None:
        return None
    return Trained(
        name=name,
        stage=stage,
        metrics=read_metrics(path) if path.is_file() else Metrics(),
        artifact=artifact,
        environment=_json(folder / "environment.json") or {},
        launch=_json(folder / "launch.json") or {},
    )


def _proofs(recipe: Recipe, name: str, record: Row) -> Iterable[tuple[tuple[str, str], bool]]:
    """For each form of an export: whether there is evidence of parity that was measured on its very bytes, with
    the model that is there now."""
    export, model = recipe.stage_dir("export"), recipe.exported_models().get(name)
    current = model is None or not model.is_dir() or record["parents"].get("model") == content_hash(model)
    proofs = {proof["file"]: proof for proof in record["evidence"] if "parity_" in proof["what"]}
    for backend in ONNX_FILES:
        paths = [export / name / file for file in graph_files(exported_stems(record["about"]), backend)]
        if all(path.is_file() for path in paths):
            passed = all(_is_proven(proofs.get(path.name), path) for path in paths)
            yield (name, backend), passed and current


def _is_proven(proof: Row | None, path: Path) -> bool:
    return proof is not None and proof.get("passed", True) and is_the_one(proof, path)


def parity_of(record: Row, backend: str) -> Row:
    """An export's evidence that the tensors of one form are its source's; of two graphs the worse figures of both."""
    files = graph_files(exported_stems(record["about"]), backend)
    found = [proof for proof in record["evidence"] if "parity_" in proof["what"] and proof.get("file") in files]
    if len(found) < 2:
        return found[0] if found else {}
    worse = {"top1": min, "max_abs": max, "relative_rms": max, "cases": _sum, "positions": _sum}
    metrics = {key: of(*(proof["metrics"][key] for proof in found)) for key, of in worse.items()}
    return found[-1] | {"metrics": metrics}


def _sum(*values: float) -> float:
    return sum(values)


def _bench(recipe: Recipe) -> Row | None:
    """The benchmark's report; rows of a model or an export that was replaced since are outdated, without figures.

    Parts that an older report lacks are empty.
    """
    report = _json(recipe.stage_dir("bench") / "report.json")
    if report is None:
        return None
    measured_pairs = {(row["model"], row["backend"]) for row in report["rows"]}
    reasons = {pair: _outdated(recipe, report, *pair) for pair in measured_pairs}
    rows = [_without_figures(row, reasons[row["model"], row["backend"]]) for row in report["rows"]]
    others = {
        part: [entry for entry in report.get(part, []) if not reasons.get((entry["model"], entry["backend"]))]
        for part in ("quality", "decode", "load", "no_energy")
    }
    return report | {"rows": rows} | others


def _outdated(recipe: Recipe, report: Row, name: str, backend: str) -> str:
    """Why a row is not about what is there now; nothing if it is, or if nothing is there to be held against."""
    what = "model" if backend in _SOURCE_BACKENDS else "export"
    folder = recipe.exported_models().get(name) if what == "model" else recipe.stage_dir("export") / name
    if folder is None or not folder.is_dir():
        return ""
    measured = report["models"].get(name, {}).get("sha256", {}).get(what)
    return "" if measured == content_hash(folder) else f"the {what} was replaced after it was measured; run bench again"


def _without_figures(row: Row, reason: str) -> Row:
    kept = ("model", "backend", "batch_size", "sequence_length", "lengths", "threads")
    return {key: row[key] for key in kept if key in row} | {"status": "outdated", "reason": reason} if reason else row


def _artifact(folder: Path) -> Row | None:
    return read_artifact(folder) if (folder / ARTIFACT_FILE).is_file() else None


def _json(path: Path) -> Row | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _lines(path: Path) -> tuple[list[Row], int]:
    """The objects of a JSON-lines file, and how many lines held none.

    A killed writer leaves half a line, to which the next attempt appends its first: the later object is taken.
    """
    rows, unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            unreadable += 1
            with_end = line[line.rfind('{"event"') :] if '{"event"' in line[1:] else ""
            rows += [json.loads(with_end)] if with_end.endswith("}") else []
    return rows, unreadable

"""The bench stage: speed, memory, size and quality of every model in every backend, one fresh process for each pair.
Timing is `windows`' and `bench_worker`'s; this module decides what may be measured and writes report.json.
"""

import contextlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from export.bench_inputs import METRICS, quality_batches, speed_arrays
from export.bench_worker import Job
from export.cases import load_documents
from export.files import is_the_one, size_mib
from export.io_spec import IoSpec, read_spec
from export.runners import usable_threads
from export.windows import MIN_CPU_SHARE, Settings
from trainer.__main__ import stage_main
from trainer.artifact import ARTIFACT_FILE, content_hash, read_artifact, versions, write_json
from trainer.config import Recipe
from trainer.environment import launch_command
from trainer.errors import GateFailed, UserError
from trainer.export_config import ONNX_FILES, Backend, Bench
from trainer.recipe_file import require_section

_COLUMNS = (  # heading, key of a row, format
    ("p50 ms", "p50_ms", ".2f"),
    ("p99 ms", "p99_ms", ".2f"),
    ("tokens/s", "real_tokens_per_s", ",.0f"),
    ("peak MiB", "peak_memory_mib", ",.0f"),
    ("file MiB", "file_mib", ".1f"),
)
_WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class Subject:
    """One model under test: where it came from, where its export lies, and what it is fed."""

    name: str
    model: Path
    exported: Path
    spec: IoSpec
    arrays: Path
    quality_batches: int
    sequences: int

    def folder(self, backend: Backend) -> Path:
        return self.exported if backend in ONNX_FILES else self.model


def run(recipe: Recipe) -> None:
    """Measure everything that the recipe names and write `<run_dir>/bench/report.json`.

    Rows without passed parity evidence are refused and rows that never settle are unstable, both with the reason.
    Raises GateFailed, after writing the report, if a backend failed.
    """
    require_section(recipe, "bench")
    assert recipe.bench is not None
    models = recipe.exported_models()
    if not models:
        raise UserError("there is no model to measure", "pretrain, distill or export.models", "name one in the recipe")
    threads = recipe.bench.threads or usable_threads()
    report: dict[str, Any] = {
        "machine": describe_machine(threads),
        "versions": {"python": platform.python_version(), **versions()},
        "command": launch_command(),
        "settings": recipe.bench.model_dump(mode="json") | {"min_cpu_share": MIN_CPU_SHARE},
        "rows": [],
        "quality": [],
        "models": {},
    }
    pairs = len(models) * len(recipe.bench.backends)
    with tempfile.TemporaryDirectory() as scratch, _progress(pairs) as advance:
        for name, model in models.items():
            subject = prepare_subject(recipe, recipe.bench, name, model, Path(scratch))
            report["models"][name] = describe_model(subject)
            for backend in recipe.bench.backends:
                advance(f"{name} {backend}")
                rows, quality = measure_backend(subject, backend, recipe.bench, threads, Path(scratch))
                report["rows"] += rows
                report["quality"] += quality
    write_json(recipe.stage_dir("bench") / "report.json", report)
    show(report)
    failed = [row for row in report["rows"] if row["status"] == "failed"]
    if failed:
        raise GateFailed(f"{len(failed)} rows failed; the first, {failed[0]['model']} {failed[0]['backend']}: "
                         f"{failed[0]['reason']}", "every backend that the recipe names to run")  # fmt: skip


def prepare_subject(recipe: Recipe, settings: Bench, name: str, model: Path, scratch: Path) -> Subject:
    """Check one model and write the arrays it is measured on; UserError for a length that it cannot take."""
    spec = read_spec(model)
    if spec.encoder is not None:
        raise UserError(f"{name} is a {spec.architecture}", "a model of one graph to measure", "leave bench out for it")
    longest = max(settings.sequence_lengths)
    if longest > spec.max_length:
        raise UserError(
            f"bench.sequence_lengths has {longest}", f"at most {spec.max_length}, what {name} takes", "shorten it"
        )
    documents = load_documents(recipe, model)
    arrays = speed_arrays(documents, spec, _shapes(settings))
    batches = []
    if spec.task in METRICS:
        batches = quality_batches(documents, spec, model, longest, settings.quality_sequences, recipe.seed)
    for index, batch in enumerate(batches):
        arrays |= {f"quality{index}|{key}": value for key, value in batch.items()}
    path = scratch / f"{name}.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type] - numpy's signature has allow_pickle among the names
    sequences = sum(len(batch["attention_mask"]) for batch in batches)
    return Subject(name, model, recipe.stage_dir("export") / name, spec, path, len(batches), sequences)


def measure_backend(
    subject: Subject, backend: Backend, settings: Bench, threads: int, scratch: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and quality entries of one model in one backend, from a fresh process if it may be measured."""
    shapes = _shapes(settings)
    head = {"model": subject.name, "backend": backend}
    fixed = [
        {
            **head,
            "batch_size": batch,
            "sequence_length": length,
            "threads": threads,
            "file_mib": file_mib(subject, backend),
        }
        for batch, length in shapes
    ]
    reason = refusal(subject, backend)
    if reason:
        return [{**row, "status": "refused", "reason": reason} for row in fixed], []
    metric = METRICS.get(subject.spec.task)
    window = Settings(threads, settings.window_s, settings.max_windows, settings.stability)
    folder = str(subject.folder(backend))
    job = Job(folder, backend, len(shapes), subject.quality_batches, metric, window, str(subject.arrays))
    result = run_worker(job, scratch / f"{subject.name}-{backend}.json")
    if isinstance(result, str):
        return [{**row, "status": "failed", "reason": result} for row in fixed], []
    rows = [{**row, **measured} for row, measured in zip(fixed, result["rows"], strict=True)]
    if metric is None:
        return rows, []
    return rows, [{**head, "metric": metric, "value": result["quality"], "sequences": subject.sequences}]


def run_worker(job: Job, path: Path) -> dict[str, Any] | str:
    """Do `job` in a fresh process with its thread count; its result, or the last line of what went wrong."""
    write_json(path, asdict(job))
    threads = str(job.settings.threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "export.bench_worker", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"the process ended with status {done.returncode}"
    return json.loads(Path(f"{path}.result").read_text(encoding="utf-8"))


def refusal(subject: Subject, backend: Backend) -> str:
    """Why this backend must not be measured, or nothing.

    An ONNX file needs evidence of passed parity that names its very bytes, and the model it was made from must be
    the one that is measured beside it. torch is the source itself; the worker holds compiled against eager.
    """
    if backend == "compile" and not shutil.which(os.environ.get("CXX", "g++")):
        return "torch.compile needs a C++ compiler (g++, or the one that CXX names)"
    if backend not in ONNX_FILES:
        return ""
    file = subject.exported / ONNX_FILES[backend]
    if not (subject.exported / ARTIFACT_FILE).is_file() or not file.is_file():
        return f"{file.name} was not exported"
    record = read_artifact(subject.exported, "onnx")
    proofs = [proof for proof in record["evidence"] if proof["what"] == f"parity_{backend.removeprefix('onnx_')}"]
    if not proofs:
        return f"no parity evidence for {file.name}"
    if not is_the_one(proofs[0], file):
        return f"{file.name} is not the file that passed parity"
    if record["parents"].get("model") != content_hash(subject.model):
        return f"{file.name} was exported from another model"
    return ""


def file_mib(subject: Subject, backend: Backend) -> float | None:
    """Size of what the backend loads; None where it is not there."""
    if backend not in ONNX_FILES:
        return _weights_mib(subject.model)
    file = subject.exported / ONNX_FILES[backend]
    return size_mib(file) if file.is_file() else None


def count_parameters(model: Path) -> int | None:
    """Parameters saved in a model folder, a tied table once; None for a folder without safetensors."""
    from safetensors import safe_open

    files = sorted(model.glob("*.safetensors"))
    total = 0
    for file in files:
        with safe_open(file, framework="np") as weights:
            total += sum(int(np.prod(weights.get_slice(key).get_shape())) for key in weights.keys())  # noqa: SIM118
    return total if files else None


def describe_model(subject: Subject) -> dict[str, Any]:
    """What was measured: size, and content hashes of the model and of its export (None where there is none)."""
    exported = content_hash(subject.exported) if (subject.exported / ARTIFACT_FILE).is_file() else None
    return {
        "parameters": count_parameters(subject.model),
        "file_mib": _weights_mib(subject.model),
        "sha256": {"model": content_hash(subject.model), "export": exported},
    }


def describe_machine(threads: int) -> dict[str, Any]:
    """What the figures depend on, without naming the machine."""
    return {
        "cpu": _cpu_model(),
        "cores": usable_threads(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def show(report: dict[str, Any]) -> None:
    """Print the report as a table, then why rows are without figures, then quality."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=f"{report['machine']['cpu']}, {report['machine']['threads']} threads",
    )
    for column in ("model", "backend", "batch"):
        table.add_column(column, no_wrap=True)
    for column, _, _ in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in report["rows"]:
        numbers = [format(row[key], style) if row.get(key) is not None else "" for _, key, style in _COLUMNS]
        if row["status"] != "ok":
            numbers[0] = row["status"]
        table.add_row(row["model"], row["backend"], f"{row['batch_size']}x{row['sequence_length']}", *numbers)
    console.print(table)
    for row in report["rows"]:
        if row["status"] != "ok":
            shape = f"{row['batch_size']}x{row['sequence_length']}"
            console.print(f"{row['model']} {row['backend']} {shape}: {row['status']}: {row['reason']}", markup=False)
    for entry in report["quality"]:
        console.print(f"{entry['model']} {entry['backend']}: {entry['metric']} {entry['value']:.4f}")


def _shapes(settings: Bench) -> list[tuple[int, int]]:
    """The grid, small shapes first: memory that a large one took is not given back."""
    grid = [(batch, length) for batch in settings.batch_sizes for length in settings.sequence_lengths]
    return sorted(set(grid), key=lambda shape: (shape[0] * shape[1], shape))


def _weights_mib(model: Path) -> float:
    return sum(file.stat().st_size for file in model.glob(_WEIGHTS)) / 2**20


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, nothing elsewhere. Gives a function that names what begins now."""
    begun = itertools.count()
    with Progress(disable=not Console().is_terminal, transient=True) as bar:
        task = bar.add_task("bench", total=total)
        yield lambda what: bar.update(task, completed=next(begun), description=what)


if __name__ == "__main__":
    stage_main("bench")

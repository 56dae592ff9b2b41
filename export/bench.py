"""The bench stage: speed, memory, size and quality of every model in every backend, one fresh process for each pair.
Timing is `windows`' and `bench_worker`'s; this module decides what may be measured and writes report.json.
"""

import contextlib
import functools
import itertools
import json
import operator
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.progress import Progress

from export.bench_inputs import METRICS, grid, prompt_arrays, prompts_of, quality_batches, speed_arrays
from export.bench_table import show
from export.bench_worker import Job
from export.cases import load_documents
from export.files import is_the_one, size_mib
from export.io_spec import IoSpec, graph_files, read_spec
from export.load import run_load, write_requests
from export.load_worker import Service
from export.noise import compare
from export.provider_audit import Audit
from export.roofline import limit_of, work_of
from export.runners import CPU_PROVIDER, process_environment, require_provider, usable_threads
from export.variants import check_bf16
from export.windows import MIN_CPU_SHARE, Settings
from trainer.__main__ import stage_main
from trainer.artifact import ARTIFACT_FILE, content_hash, read_artifact, versions, write_json
from trainer.config import Recipe
from trainer.environment import gpu_driver, launch_command, nvidia_smi
from trainer.errors import GateFailed, UserError
from trainer.export_config import ENGINES, ONNX_FILES, Backend, Bench
from trainer.recipe_file import require_section

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
        return self.exported if backend in ONNX_FILES or backend in ENGINES else self.model


def run(recipe: Recipe) -> None:
    """Measure everything that the recipe names and write `<run_dir>/bench/report.json`.

    Rows without passed parity evidence, or of which a node ran elsewhere than asked, are refused and rows that never
    settle are unstable, all with the reason. One pair is measured twice: what differs by less is not ranked.
    Raises GateFailed, after writing the report, if a backend failed.
    """
    require_section(recipe, "bench")
    assert recipe.bench is not None
    settings, models = recipe.bench, recipe.exported_models()
    if not models:
        raise UserError("there is no model to measure", "pretrain, distill or export.models", "name one in the recipe")
    if set(settings.backends) & set(ONNX_FILES):
        require_provider(settings.provider)
    if "onnx_bf16" in settings.backends:
        check_bf16(settings.provider)
    threads = settings.threads or usable_threads()
    report: dict[str, Any] = {
        "machine": describe_machine(threads, settings.provider),
        "versions": {"python": platform.python_version(), **versions()},
        "command": launch_command(),
        "settings": settings.model_dump(mode="json") | {"min_cpu_share": MIN_CPU_SHARE},
        "models": {},
        **{part: [] for part in ("rows", "quality", "decode", "load", "no_energy")},
    }
    pairs = len(models) * len(settings.backends) + 2
    with tempfile.TemporaryDirectory() as folder, _progress(pairs) as advance:
        scratch = Path(folder)
        subjects = {name: prepare_subject(recipe, settings, name, model, scratch) for name, model in models.items()}
        for name, subject in subjects.items():
            report["models"][name] = describe_model(subject)
            for backend in settings.backends:
                advance(f"{name} {backend}")
                for part, entries in measure_backend(subject, backend, settings, threads, scratch).items():
                    report[part] += entries
        advance("the same again")
        report["noise"] = measure_noise(subjects, report["rows"], settings, threads, scratch)
        advance("the machine")
        report["rates"] = measure_rates(settings.provider, threads, scratch)
        add_limits(report, subjects)
        if settings.load is not None:
            report["load"] = measure_loads(subjects, report["rows"], settings, threads, recipe.seed, scratch)
    write_json(recipe.stage_dir("bench") / "report.json", report)
    show(report)
    failed = [row for row in (*report["rows"], *report["load"]) if row["status"] == "failed"]
    if failed:
        raise GateFailed(f"{len(failed)} rows failed; the first, {failed[0]['model']} {failed[0]['backend']}: "
                         f"{failed[0]['reason']}", "every backend that the recipe names to run")  # fmt: skip


def prepare_subject(recipe: Recipe, settings: Bench, name: str, model: Path, scratch: Path) -> Subject:
    """Check one model and write the arrays it is measured on; UserError for a length that it cannot take."""
    spec = read_spec(model)
    longest = max(settings.sequence_lengths)
    _check_lengths(settings, spec, name)
    documents = load_documents(recipe, model)
    arrays = speed_arrays(documents, spec, grid(settings), recipe.seed)
    arrays |= prompt_arrays(documents, spec, prompts_of(settings, spec))
    batches = []
    if spec.task in METRICS:
        batches = quality_batches(documents, spec, model, longest, settings.quality_sequences, recipe.seed)
    for index, batch in enumerate(batches):
        arrays |= {f"quality{index}|{key}": value for key, value in batch.items()}
    path = scratch / f"{name}.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type] - numpy's signature has allow_pickle among the names
    if settings.load is not None:
        write_requests(documents, longest, recipe.seed, _requests(scratch, name))
    sequences = sum(len(batch["attention_mask"]) for batch in batches)
    return Subject(name, model, recipe.stage_dir("export") / name, spec, path, len(batches), sequences)


def measure_backend(
    subject: Subject, backend: Backend, settings: Bench, threads: int, scratch: Path
) -> dict[str, list[dict[str, Any]]]:
    """Rows of one model in one backend, and its quality and speed of generating where it has them: from a fresh
    process, if it may be measured."""
    head = {"model": subject.name, "backend": backend}
    shared: dict[str, Any] = {"threads": threads, "file_mib": file_mib(subject, backend)}
    reason = refusal(subject, backend)
    if not reason and backend in ENGINES:
        reason, engines = ready_engines(subject, ENGINES[backend], threads, scratch)
        shared |= {"engines": engines, "file_mib": sum(engine["file_mib"] for engine in engines) or None}
    fixed = [{**head, **asdict(cell), **shared} for cell in grid(settings)]
    if reason:
        return {"rows": [{**row, "status": "refused", "reason": reason} for row in fixed]}
    job = job_of(subject, backend, settings, threads)
    result = run_worker(job, scratch / f"{subject.name}-{backend}.json")
    if isinstance(result, str):
        return {"rows": [{**row, "status": "failed", "reason": result} for row in fixed]}
    audit = Audit(**result["audit"]) if result["audit"] else None
    if audit and audit.strayed:
        return {"rows": [{**row, "status": "refused", "reason": audit.reason(settings.provider)} for row in fixed]}
    measured = {"cold_start_s": result["cold_start_s"], "nodes": audit.nodes if audit else None}
    found = {"rows": [{**row, **measured, **figures} for row, figures in zip(fixed, result["rows"], strict=True)]}
    without = [result["no_energy"], *(row.get("no_energy") for row in (*result["rows"], *result["decode"]))]
    found["no_energy"] = [{**head, "reason": reason} for reason in dict.fromkeys(without) if reason]
    if job.metric is not None:
        quality = {**head, "metric": job.metric, "value": result["quality"], "sequences": subject.sequences}
        found["quality"] = [quality]
    found["decode"] = [
        {**head, "batch_size": batch, "prompt_tokens": length, "new_tokens": job.new_tokens, **shared, **figures}
        for (batch, length), figures in zip(prompts_of(settings, subject.spec), result["decode"], strict=False)
    ]
    return found


def measure_noise(
    subjects: dict[str, Subject], rows: list[dict[str, Any]], settings: Bench, threads: int, scratch: Path
) -> dict[str, Any]:
    """What the speed of one model in one backend differs by from itself, in another process at the end of the run.

    Taken is the first pair in ONNX Runtime, which opens soonest, else the first of all that has figures.
    """
    stable = [row for row in rows if row["status"] == "ok"]
    taken = next((row for row in stable if row["backend"] in ONNX_FILES), stable[0] if stable else None)
    if taken is None:
        return {"relative": None, "shapes": [], "reason": "no row is stable"}
    pair = {key: taken[key] for key in ("model", "backend")}
    job = job_of(subjects[taken["model"]], taken["backend"], settings, threads)
    job = replace(job, quality_batches=0, metric=None, audited=False, prompts=0)
    result = run_worker(job, scratch / "again.json")
    if isinstance(result, str):
        return pair | {"relative": None, "shapes": [], "reason": result}
    first = [row for row in rows if pair.items() <= row.items()]
    keys = [asdict(cell) for cell in grid(settings)]
    found = compare(first, [key | row for key, row in zip(keys, result["rows"], strict=True)])
    return pair | found | {"reason": "" if found["shapes"] else "no row was stable twice"}


def measure_rates(provider: str, threads: int, scratch: Path) -> dict[str, Any]:
    """What the machine can do at the most, from a fresh process, or why that is not known."""
    path = scratch / "rates.json"
    problem = _run_module("export.machine_rates", threads, str(threads), provider, str(path))
    return {"reason": problem} if problem else json.loads(path.read_text(encoding="utf-8"))


def add_limits(report: dict[str, Any], subjects: dict[str, Subject]) -> None:
    """Write into each row what share of the machine's limit it reaches, and which limit that is."""
    for name, subject in subjects.items():
        work = work_of(subject.model, subject.spec)
        for row in (*report["rows"], *report["decode"]):
            if work is not None and row["model"] == name:
                row |= limit_of(row, work, report["rates"])


def measure_loads(
    subjects: dict[str, Subject], rows: list[dict[str, Any]], settings: Bench, threads: int, seed: int, scratch: Path
) -> list[dict[str, Any]]:
    """The load test of every pair that has figures and that the recipe asks for."""
    assert settings.load is not None
    wanted = settings.load.backends or settings.backends
    pairs: dict[tuple[str, Backend], None] = dict.fromkeys(
        (row["model"], row["backend"])
        for row in rows
        if row["status"] in ("ok", "unstable") and row["backend"] in wanted
    )
    entries = []
    for name, backend in pairs:
        service = Service(
            folder=str(subjects[name].folder(backend)),
            backend=backend,
            provider=settings.provider,
            threads=threads,
            arrays=str(_requests(scratch, name)),
            max_batch=settings.load.max_batch,
            max_wait_s=settings.load.max_wait_ms / 1e3,
            new_tokens=settings.load.new_tokens,
        )
        found = run_load(service, settings.load, seed, scratch / f"{name}-{backend}-load.json")
        entries.append({"model": name, "backend": backend, "limit_ms": settings.load.p99_limit_ms, **found})
    return entries


def job_of(subject: Subject, backend: Backend, settings: Bench, threads: int) -> Job:
    """All that a fresh process has to do for one model in one backend."""
    return Job(
        folder=str(subject.folder(backend)),
        backend=backend,
        cells=len(grid(settings)),
        quality_batches=subject.quality_batches,
        metric=METRICS.get(subject.spec.task),
        settings=Settings(threads, settings.window_s, settings.max_windows, settings.stability),
        arrays=str(subject.arrays),
        provider=settings.provider,
        audited=backend in ONNX_FILES,
        cuda_graphs=settings.cuda_graphs,
        prompts=0 if _is_made_anew(subject, backend, settings) else len(prompts_of(settings, subject.spec)),
        new_tokens=settings.decode.new_tokens if settings.decode else 0,
        pair=asdict(subject.spec) if subject.spec.encoder else None,
    )


def _is_made_anew(subject: Subject, backend: Backend, settings: Bench) -> bool:
    """Whether a backend prepares itself for each length of the cache: torch.compile takes minutes, of which no figure
    would speak, and an encoder-decoder's recorded engine keeps memory for each."""
    return backend == "compile" or (settings.cuda_graphs and backend in ENGINES and subject.spec.encoder is not None)


def run_worker(job: Job, path: Path) -> dict[str, Any] | str:
    """Do `job` in a fresh process with its thread count; its result, or the last line of what went wrong."""
    write_json(path, asdict(job))
    problem = _run_module("export.bench_worker", job.settings.threads, str(path))
    return problem or json.loads(Path(f"{path}.result").read_text(encoding="utf-8"))


def _run_module(name: str, threads: int, *arguments: str) -> str:
    """Run a module of ours in a fresh process; the last line of what went wrong, or nothing."""
    command = [sys.executable, "-m", name, *arguments]
    done = subprocess.run(command, env=process_environment(threads), capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"the process ended with status {done.returncode}"


def ready_engines(subject: Subject, variant: str, threads: int, scratch: Path) -> tuple[str, list[dict[str, Any]]]:
    """Why no engine of a variant may be measured here, or nothing, and which ones are, one for each graph, and what
    their numbers differ by.

    In a process of its own, so that cold starts are cold: one that was built elsewhere may have to be built anew.
    """
    path = scratch / f"{subject.name}-{variant}-engines.json"
    problem = _run_module("export.rebuild", threads, str(subject.exported), variant, str(path))
    return (problem, []) if problem else ("", json.loads(path.read_text(encoding="utf-8"))["engines"])


def refusal(subject: Subject, backend: Backend) -> str:
    """Why this backend must not be measured, or nothing.

    An ONNX file needs evidence of passed parity that names its very bytes, and the model it was made from must be
    the one that is measured beside it, and so does the graph of an engine, whose own numbers `ready_engines` sees to.
    torch is the source itself; the worker holds compiled against eager.
    """
    if backend == "compile" and not shutil.which(os.environ.get("CXX", "g++")):
        return "torch.compile needs a C++ compiler (g++, or the one that CXX names)"
    graph = f"onnx_{ENGINES[backend]}" if backend in ENGINES else backend
    if graph not in ONNX_FILES:
        return ""
    variant = graph.removeprefix("onnx_")
    names = [f"{part.prefix}parity_{variant}" for part in subject.spec.parts]
    reasons = map(functools.partial(_unproven, subject), names, onnx_files(subject, graph))
    return next(filter(None, reasons), "")


def onnx_files(subject: Subject, backend: str) -> list[Path]:
    """The graph files of a model in a backend of ONNX Runtime's."""
    return [subject.exported / name for name in graph_files([part.stem for part in subject.spec.parts], backend)]


def _unproven(subject: Subject, what: str, file: Path) -> str:
    """Why a graph file must not be measured, or nothing; `what`: the name of its evidence."""
    if not (subject.exported / ARTIFACT_FILE).is_file() or not file.is_file():
        return f"{file.name} was not exported"
    record = read_artifact(subject.exported, "onnx")
    proofs = [proof for proof in record["evidence"] if proof["what"] == what]
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
    files = onnx_files(subject, backend)
    return sum(map(size_mib, files)) if all(file.is_file() for file in files) else None


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


def describe_machine(threads: int, provider: str = CPU_PROVIDER) -> dict[str, Any]:
    """What the figures depend on, without naming the machine; its GPUs where they are those of a GPU's provider."""
    on_gpu = {} if provider == CPU_PROVIDER else {"gpus": list(nvidia_smi("name,memory.total")), "driver": gpu_driver()}
    return on_gpu | {
        "cpu": _cpu_model(),
        "cores": usable_threads(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _check_lengths(settings: Bench, spec: IoSpec, name: str) -> None:
    """UserError for a key that asks for more tokens than the model takes."""
    longest = max(settings.sequence_lengths)
    together = max if spec.encoder else operator.add  # a text and its answer have room of their own, or share it
    asked = {"bench.sequence_lengths has": longest}
    if settings.decode is not None and (prompts := prompts_of(settings, spec)):
        asked["bench.decode takes"] = together(max(length for _, length in prompts), settings.decode.new_tokens)
    if settings.load is not None and spec.cache is not None:
        asked["bench.load takes sequence_lengths and new_tokens,"] = together(longest, settings.load.new_tokens)
    for what, tokens in asked.items():
        if tokens > spec.max_length:
            raise UserError(f"{what} {tokens}", f"at most {spec.max_length}, what {name} takes", "shorten it")


def _requests(scratch: Path, name: str) -> Path:
    return scratch / f"{name}-requests.npz"


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

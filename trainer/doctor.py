"""The `doctor` verb: what this machine has, which version, what it is usable for and what to do about the rest.
It changes nothing; every probe is a process of its own, so that a library that crashes or hangs becomes a row."""

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.__main__ import stage_main
from trainer.environment import APEX_BUILD, apex_kind, gpus, peak_flops, processor
from trainer.errors import UserError

_PROBE_LIMIT_S = 180.0  # a first import of torch from a cold network disk takes more than a minute
_MARK = "lmworks-doctor:"  # libraries print as they are imported; the result is the line that begins so
_MIN_MEMORY_GIB = 4.0  # quickstart's, see trainer/recipes/quickstart.yaml
_MIN_DISK_GIB = 5.0  # assumed: checkpoints and exports of a small model, with room for one rewrite
_STYLES = {"ok": "green", "absent": "dim", "problem": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One row. State: ok; absent: optional and not there; problem: works only in part; broken: a stage cannot run."""

    name: str
    state: str
    found: str
    use: str = ""
    do: str = ""


# Needed by some stage: package on PyPI, what is imported, what it is for.
CORE = {
    "torch": ("torch", "training"),
    "transformers": ("transformers.configuration_utils", "models, tokenizers"),
    "accelerate": ("accelerate", "training on several ranks"),
    "tokenizers": ("tokenizers", "prepare"),
    "safetensors": ("safetensors", "model folders"),
    "tensorboard": ("tensorboard.summary.writer.event_file_writer", "training logs"),
    "onnx": ("onnx", "export"),
    "onnxscript": ("onnxscript", "export"),
    "matplotlib": ("matplotlib.figure", "report"),
    "pyarrow": ("pyarrow.parquet", "reading Parquet"),
    "zstandard": ("zstandard", "reading .zst"),
}


def run() -> None:
    """Probe everything and print one table. UserError if something that a stage needs is broken."""
    with Console(stderr=True).status("probing"), ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 2)) as pool:
        findings = [row for rows in pool.map(probe_apart, PROBES) for row in rows]
    _show(findings)
    broken = [row for row in findings if row.state == "broken"]
    if broken:
        raise UserError(
            "; ".join(f"{row.name}: {row.found}" for row in broken),
            f"working {', '.join(row.name for row in broken)}",
            "\n".join(row.do for row in broken if row.do),
        )


def probe_apart(name: str) -> list[Finding]:
    """Run one probe in a fresh process; its rows, or one that says how it ended."""
    code = f"from trainer.doctor import print_probe; print_probe({name!r})"
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [_fault(name, f"no answer in {_PROBE_LIMIT_S:.0f} s")]
    results = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not results:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return [_fault(name, said[-1][:300] if said else f"the process ended with status {done.returncode}")]
    return [Finding(**row) for row in json.loads(results[-1])]


def print_probe(name: str) -> None:
    """Run one probe in this process and print its rows behind a mark."""
    print(_MARK + json.dumps([asdict(row) for row in PROBES[name]()]), flush=True)


def _fault(name: str, what: str) -> Finding:
    if name not in CORE:
        return Finding(name, "problem", what, do="mend or remove it; nothing else depends on it")
    return Finding(
        name, "broken", what, CORE[name][1], f"pip install --force-reinstall --no-deps -c constraints.txt {name}"
    )


# ---- probes ----------------------------------------------------------------------------------------------------


def _python() -> list[Finding]:
    good = sys.version_info >= (3, 11)
    use = "everything" if good else "nothing: lmworks needs 3.11 or newer"
    do = "" if good else "make a virtual environment with a newer Python"
    return [Finding("Python", "ok" if good else "broken", platform.python_version(), use, do)]


def _machine() -> list[Finding]:
    cpu = processor()
    free_gib = psutil.virtual_memory().available / 2**30
    disk_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    cores = f"{cpu['model']}, {cpu['physical_cores'] or '?'} cores, {cpu['usable_cores']} usable CPUs"
    return [
        Finding("CPU", "ok", cores, "training, export, bench"),
        _enough(
            "memory", free_gib, f"free of {cpu['memory_gib']} GiB", _MIN_MEMORY_GIB, "close programs or go smaller"
        ),
        _enough("disk", disk_gib, "free in this folder", _MIN_DISK_GIB, "free space, or set run_dir to another disk"),
    ]


def _enough(name: str, have_gib: float, of: str, needed_gib: float, do: str) -> Finding:
    found = f"{have_gib:.1f} GiB {of}"
    if have_gib >= needed_gib:
        return Finding(name, "ok", found, "the quickstart recipes and more")
    return Finding(name, "problem", found, f"under {needed_gib:.0f} GiB: not even quickstart is sure to fit", do)


def _torch() -> list[Finding]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else None
    hip = getattr(torch.version, "hip", None)
    build = build or (f"ROCm {hip}" if hip else "CPU build")
    assert float(torch.ones(8, 8).matmul(torch.ones(8, 8)).sum()) == 512.0  # a broken BLAS shows here, not in a run
    row = Finding("torch", "ok", f"{torch.__version__}, {build}", "training, eager and compile backends")
    seen = gpus()
    return [row, *([_gpu(gpu) for gpu in seen] or [_no_gpu(build)])]


def _gpu(gpu: dict[str, str | float]) -> Finding:
    name = str(gpu["name"])
    found = f"{name}, {gpu['memory_gib']} GiB, compute capability {gpu['compute_capability']}"
    has_bf16 = float(gpu["compute_capability"]) >= 8.0  # NVIDIA: from Ampere on
    use = "training in fp32 and bf16" if has_bf16 else "training in fp32 (no bf16 units)"
    known = peak_flops(name, "bf16" if has_bf16 else "fp32") is not None
    return Finding("GPU", "ok", found, use + ("" if known else "; peak unknown, so no MFU is reported"))


def _no_gpu(build: str) -> Finding:
    if not shutil.which("nvidia-smi"):
        return Finding("GPU", "absent", "none", "stages run on the CPU")
    listed = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    if listed is None:
        return Finding("GPU", "problem", "nvidia-smi fails", "stages run on the CPU", "look at the driver: nvidia-smi")
    do = "look at CUDA_VISIBLE_DEVICES and the driver's version"
    if build == "CPU build":
        do = "install torch's CUDA build (pytorch.org, Get Started)"
    return Finding("GPU", "problem", f"{listed}, not seen by torch ({build})", "stages run on the CPU", do)


def _core(name: str) -> Callable[[], list[Finding]]:
    def probe() -> list[Finding]:
        module, use = CORE[name]
        if _version(name) is None:
            return [Finding(name, "broken", "not installed", use, f"pip install {name}")]
        importlib.import_module(module)
        return [Finding(name, "ok", _version(name) or "", use)]

    return probe


def _deepspeed() -> list[Finding]:
    if _version("deepspeed") is None:
        use = "sharded training (ZeRO); not needed otherwise"
        return [Finding("deepspeed", "absent", "not installed", use, "for it: pip install 'lmworks[deepspeed]'")]
    importlib.import_module("deepspeed")
    tools = {"ninja": shutil.which("ninja"), "g++": shutil.which("g++"), "nvcc": _nvcc()}
    missing = [tool for tool in ("ninja", "g++") if tools[tool] is None]
    found = f"{_version('deepspeed')}; its ops build with {', '.join(tool for tool, at in tools.items() if at) or '-'}"
    if missing:
        do = f"install {' and '.join(missing)} to have its own optimizers and offload built"
        return [Finding("deepspeed", "problem", found, "ZeRO with torch's optimizers; no op can be built", do)]
    use = (
        "ZeRO; CPU and CUDA ops can be built" if tools["nvcc"] else "ZeRO; CPU ops can be built, CUDA ops not (no nvcc)"
    )
    return [Finding("deepspeed", "ok", found, use)]


def _onnxruntime() -> list[Finding]:
    cpu, gpu = _version("onnxruntime"), _version("onnxruntime-gpu")
    if cpu and gpu:
        do = "pip uninstall -y onnxruntime onnxruntime-gpu, then install one: 'lmworks[cpu]' or 'lmworks[gpu]'"
        found = f"onnxruntime {cpu} and onnxruntime-gpu {gpu}"
        return [Finding("ONNX Runtime", "problem", found, "unsure: both write the same folder, the last one rules", do)]
    if not cpu and not gpu:
        do = "pip install 'lmworks[cpu]', or 'lmworks[gpu]' where there is an NVIDIA GPU"
        return [Finding("ONNX Runtime", "problem", "not installed", "export and bench cannot run", do)]
    runtime = importlib.import_module("onnxruntime")
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in runtime.get_available_providers())
    return [Finding("ONNX Runtime", "ok", f"{cpu or gpu} for {providers}", "export's parity gate, bench")]


def _tensorrt() -> list[Finding]:
    rows = []
    uses = {"tensorrt": "engines for the GPU that is here", "tensorrt-rtx": "engines without a GPU: 'lmworks[rtx]'"}
    for package, use in uses.items():
        if _version(package) is None:
            rows.append(Finding(package, "absent", "not installed", use))
            continue
        importlib.import_module(package.replace("-", "_"))
        rows.append(Finding(package, "ok", _version(package) or "", use))
    return rows


def _apex() -> list[Finding]:
    kind, version, use = apex_kind(), _version("apex") or "no version", "optim.backend: apex"
    if kind == "absent":
        return [Finding("apex", "absent", "not installed", f"{use}; not needed otherwise")]
    if kind == "nvidia":
        return [Finding("apex", "ok", f"NVIDIA's, {version}", use)]
    if kind == "without kernels":
        found = f"NVIDIA's, {version}, built without its CUDA kernels"
        return [Finding("apex", "problem", found, "nothing", APEX_BUILD)]
    do = f"pip uninstall apex; {APEX_BUILD}"
    return [Finding("apex", "problem", f"{version}: not NVIDIA's, another project of that name", "nothing", do)]


def _compilers() -> list[Finding]:
    compiler = os.environ.get("CXX", "g++")
    nvcc = _nvcc()
    return [
        _tool(compiler, [compiler, "--version"], "the compile backend on CPUs", "install it (Debian: apt install g++)"),
        _tool("ninja", ["ninja", "--version"], "building DeepSpeed's ops", "for that: pip install ninja"),
        _tool("nvcc", [nvcc or "nvcc", "--version"], "building CUDA ops", "for that: install the CUDA toolkit"),
        _tool("git", ["git", "--version"], "the commit in environment.json", "install git to have it recorded"),
    ]


def _slurm() -> list[Finding]:
    return [
        _tool("sbatch", ["sbatch", "--version"], "batch jobs", ""),
        _tool("scontrol", ["scontrol", "--version"], "looking at and requeueing of jobs", ""),
    ]


PROBES: dict[str, Callable[[], list[Finding]]] = {
    "Python": _python,
    "machine": _machine,
    "torch": _torch,
    **{name: _core(name) for name in CORE if name != "torch"},
    "deepspeed": _deepspeed,
    "ONNX Runtime": _onnxruntime,
    "tensorrt": _tensorrt,
    "apex": _apex,
    "compilers": _compilers,
    "SLURM": _slurm,
}


# ---- helpers ---------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    found = next(iter(metadata.distributions(name=package)), None)
    return found.version if found else None


def _tool(name: str, command: list[str], use: str, do: str) -> Finding:
    text = _output(command)
    if text is None:
        return Finding(name, "absent", "not found", f"without it no {use}", do)
    lines = [line for line in text.splitlines() if re.search(r"\d+\.\d+", line)]
    released = [line for line in lines if "release" in line]  # nvcc says its version in the middle of five lines
    return Finding(name, "ok", (released or lines or ["found"])[0], use)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home, "bin")))


def _output(command: list[str]) -> str | None:
    """What a command prints, None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _show(findings: list[Finding]) -> None:
    """Three columns, as words of five would not fit into eighty characters whole."""
    table = Table(title="lmworks doctor")
    for column in ("", "state", "found, usable for, to do"):
        table.add_column(column, overflow="fold")
    for row in findings:
        style = _STYLES[row.state]
        about = [row.found, row.use, f"to do: {row.do}" if row.do else ""]
        cells = [escape(text) for text in (row.name, row.state, "\n".join(text for text in about if text))]
        table.add_row(*cells, style=style if row.state != "ok" else "")
    Console().print(table)


if __name__ == "__main__":
    stage_main("doctor")

"""What a run stood on: versions, processor, GPUs, git state, and the command that gives it again.
Judging whether that is enough is `doctor`'s business; nothing here imports torch before it is asked about GPUs."""

import functools
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import psutil

from trainer.artifact import versions

_CHECKOUT = Path(__file__).resolve().parents[1]
_ALSO_VERSIONED = ("deepspeed", "onnxscript", "safetensors", "pydantic")
# Only variables that change speed, numbers or placement. A list of what to take, because a list of what to leave out
# would one day miss a token.
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TOKENIZERS_PARALLELISM",
    "DS_ACCELERATOR",
    "ACCELERATE_MIXED_PRECISION",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_CPUS_PER_TASK",
)

# What to do about a missing or wrong Apex; the command is that of its README.
APEX_BUILD = (
    "build NVIDIA's from github.com/NVIDIA/apex: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)

# Dense peaks in TFLOP/s from the makers' datasheets (half the figure where they print it "with sparsity"); fp32 is
# without TF32, which is how torch multiplies fp32 matrices by default. The names are what
# torch.cuda.get_device_name gives, matched whole: an A10G is no A10, a MIG slice is no H100, an H20 is no H200.
_PEAKS_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA Tesla V100 datasheet (2020): tensor performance; the card has no bf16
    (r"Tesla V100-SXM[23]-\d+GB(-LS)?", {"fp32": 15.7, "fp16": 125.0}),
    (r"Tesla V100-PCIE-\d+GB", {"fp32": 14.0, "fp16": 112.0}),
    # NVIDIA T4 datasheet (2019); no bf16
    (r"Tesla T4", {"fp32": 8.1, "fp16": 65.0}),
    # NVIDIA A100 datasheet (2021), the same for SXM and PCIe
    (r"NVIDIA A100[- ](SXM4|PCIE|PG509)-\d+GB|NVIDIA A100 80GB PCIe", {"fp32": 19.5, "fp16": 312.0, "bf16": 312.0}),
    # NVIDIA A10 datasheet (2021)
    (r"NVIDIA A10", {"fp32": 31.2, "fp16": 125.0, "bf16": 125.0}),
    # NVIDIA L4 datasheet (2023): 242 with sparsity
    (r"NVIDIA L4", {"fp32": 30.3, "fp16": 121.0, "bf16": 121.0}),
    # NVIDIA L40S datasheet (2023)
    (r"NVIDIA L40S", {"fp32": 91.6, "fp16": 362.05, "bf16": 362.05}),
    # NVIDIA Ada GPU architecture whitepaper, appendix A: with fp32 accumulation
    (r"NVIDIA GeForce RTX 4090", {"fp32": 82.6, "fp16": 165.2, "bf16": 165.2}),
    # NVIDIA H100 datasheet (2023): SXM 1,979 and PCIe 1,513 with sparsity; HBM2e cards under other names are slower
    (r"NVIDIA H100 80GB HBM3", {"fp32": 67.0, "fp16": 989.4, "bf16": 989.4}),
    (r"NVIDIA H100 PCIe", {"fp32": 51.0, "fp16": 756.5, "bf16": 756.5}),
    # NVIDIA H200 datasheet (2024): SXM 1,979 and NVL 1,671 with sparsity
    (r"NVIDIA H200", {"fp32": 67.0, "fp16": 989.4, "bf16": 989.4}),
    (r"NVIDIA H200 NVL", {"fp32": 60.0, "fp16": 835.5, "bf16": 835.5}),
    # NVIDIA GH200 Grace Hopper datasheet (2024): 1,979 with sparsity
    (r"NVIDIA GH200 \d+GB", {"fp32": 67.0, "fp16": 989.4, "bf16": 989.4}),
    # NVIDIA HGX B200 datasheet (2024): 36 PFLOP/s with sparsity for eight; its fp32 figure changed, so none here
    (r"NVIDIA B200", {"fp16": 2250.0, "bf16": 2250.0}),
    # AMD Instinct MI300X datasheet (2023)
    (r"AMD Instinct MI300X( OAM| VF)?", {"fp32": 163.4, "fp16": 1307.4, "bf16": 1307.4}),
    # AMD Instinct MI250 / MI250X datasheets (2021): 362.1 and 383 a card, of which torch sees the two halves
    (r"AMD Instinct MI250", {"fp16": 181.05, "bf16": 181.05}),
    (r"AMD Instinct MI250X", {"fp16": 191.5, "bf16": 191.5}),
)


def describe() -> dict[str, Any]:
    """Everything about this process's surroundings that may explain a number; the content of environment.json."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions() | _more_versions(),
        "processor": processor(),
        "gpus": gpus(),
        "git": git_state(_CHECKOUT),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def processor() -> dict[str, Any]:
    """Model name, cores (None where the system does not tell) and memory in GiB of this machine."""
    return {
        "model": _cpu_model(),
        "physical_cores": psutil.cpu_count(logical=False),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory in GiB and compute capability of each GPU that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    seen = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "compute_capability": f"{gpu.major}.{gpu.minor}",
        }
        for gpu in seen
    ]


@functools.cache
def nvidia_smi(query: str) -> tuple[str, ...]:
    """What NVIDIA's tool says of each GPU; nothing where there is none. Other than torch it takes no memory there."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
    except OSError:
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip()) if not done.returncode else ()


def gpu_driver() -> str | None:
    """Version of NVIDIA's driver; None where there is none."""
    return next(iter(nvidia_smi("driver_version")), None)


def apex_kind() -> Literal["absent", "other", "without kernels", "nvidia"]:
    """Which package named apex is installed: PyPI's is another project. Told by files, as importing it starts CUDA."""
    spec = util.find_spec("apex")
    if spec is None:
        return "absent"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return "other"
    return "nvidia" if util.find_spec("amp_C") else "without kernels"


def peak_flops(device_name: str, precision: str) -> float | None:
    """Datasheet peak in FLOP/s (dense) of one device at "fp32", "fp16" or "bf16"; None where it is not known.

    Without a peak there is no MFU: a guessed one would put a wrong number on every report.
    """
    for pattern, peaks in _PEAKS_TFLOPS:
        if re.fullmatch(pattern, device_name.strip()):
            return peaks[precision] * 1e12 if precision in peaks else None
    return None


def launch_command() -> str:
    """The command line that starts this program again, quoted for a shell, without absolute paths.

    Ranks that a launcher started are written as the `accelerate launch` with their number.
    """
    return shlex.join([*_program(Path(sys.argv[0])), *(_portable(word) for word in sys.argv[1:])])


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout at `folder` and whether files differ from it; None if it is none or git is missing."""
    if not (folder / ".git").exists():
        return None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _more_versions() -> dict[str, str]:
    installed = {name: next(iter(metadata.distributions(name=name)), None) for name in _ALSO_VERSIONED}
    return {name: found.version for name, found in installed.items() if found is not None}


def _cpu_model() -> str:
    """Name of the processor: from Linux's /proc/cpuinfo, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if named:
            return named.group(1).strip()
    return platform.processor() or platform.machine()


def _program(started: Path) -> list[str]:
    """How a user starts what sys.argv[0] names."""
    if started.suffix != ".py":
        return [started.name]  # an installed command such as lmworks
    what = ["-m", f"{started.parent.name}.{started.stem}"]
    if started.stem == "__main__":
        what = ["-m", started.parent.name]
    elif started.parent.name not in ("trainer", "export"):
        what = [_relative(str(started))]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        machines = ranks // int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks)))
        several = ["--num_machines", str(machines)] if machines > 1 else []
        return ["accelerate", "launch", *several, "--num_processes", str(ranks), *what]
    return ["lmworks"] if what == ["-m", "trainer"] else ["python", *what]


def _portable(word: str) -> str:
    """An argument with absolute paths, also those after `key=`, made relative to the working directory."""
    key, equals, value = word.partition("=")
    if equals and value.startswith("/"):
        return f"{key}={_relative(value)}"
    return _relative(word) if word.startswith("/") else word


def _relative(path: str) -> str:
    return os.path.relpath(path)

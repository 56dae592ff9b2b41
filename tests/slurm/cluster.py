"""A real SLURM of several nodes on this machine, and lmworks jobs on it: started, watched, disturbed, compared.
The daemons are slurm_local.sh's; what must come of a disturbance is said by the tests and the drill."""

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "slurm_local.sh"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
QUICK = {  # a cluster that notices within seconds
    "SLURM_LOCAL_SLURMD_TIMEOUT": "5",
    "SLURM_LOCAL_MESSAGE_TIMEOUT": "3",
    "SLURM_LOCAL_GRACE": "30",
}


def missing() -> str:
    """Why no SLURM can be had here; nothing if it can."""
    absent = [name for name in ("munge", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=_PATH)]
    return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge" if absent else ""


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """Daemons in a short folder, as their sockets' paths may not be long."""

    def __init__(self, folder: Path, nodes: int = 4, gpus: int = 4) -> None:
        self.folder = folder
        self.environment = os.environ | QUICK | {"PATH": _PATH, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.environment |= {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}
        self._local("start", "--nodes", str(nodes), "--gpus", str(gpus), "--no-install", "--clean")

    def _local(self, verb: str, *words: str) -> None:
        done = self.call(str(SCRIPT), verb, str(self.folder), *words, check=False)
        assert done.returncode == 0, done.stderr

    def call(self, *command: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=cwd, check=False)
        assert not check or done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done

    def lmworks(self, *words: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return self.call(sys.executable, "-m", "trainer", *words, check=check, cwd=cwd)

    def submit(self, recipe: Path, *words: str) -> "Chain":
        """Submit a recipe from its folder."""
        self.lmworks("submit", str(recipe), *words, cwd=recipe.parent)
        run_dir = Path(json.loads(recipe.read_text())["run_dir"])
        return Chain(self, run_dir, json.loads((run_dir / "slurm" / "jobs.json").read_text())["jobs"])

    def show(self, job: str) -> dict[str, str]:
        line = self.call("scontrol", "show", "job", "--oneliner", job).stdout
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def kill_node(self, name: str) -> None:
        self._local("kill-node", name)

    def start_node(self, name: str) -> None:
        self._local("start-node", name)

    @property
    def has_networks(self) -> bool:
        """Whether each node has a network of its own, whose speed can be set."""
        return "isolation=net" in (self.folder / "setup").read_text()

    @contextlib.contextmanager
    def slow_node(self, name: str) -> Iterator[None]:
        """A node whose network is slow while the block runs."""
        self._local("slow-node", name)
        yield
        self._local("fast-node", name)

    def ranks(self, job: str, node: str = "") -> list[int]:
        """Process ids of a job's ranks, of all nodes or of one."""
        wanted = {f"SLURM_JOB_ID={job}", *([f"SLURMD_NODENAME={node}"] if node else [])}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                variables = set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
            except OSError:
                continue
            launcher = b"srun" in words[0] or any(b"accelerate" in word for word in words)
            if b"slurm.rank" in words and not launcher and wanted <= variables:
                found.append(int(folder.name))
        return sorted(found)

    def restart_slurmd(self, node: str) -> None:
        """End a node's daemon while its job goes on, and start it again."""
        pid = int((self.folder / "run" / f"slurmd.{node}.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        self.start_node(node)

    def stop(self) -> None:
        self._local("stop")


class Chain:
    """The jobs of one run folder."""

    def __init__(self, cluster: Cluster, run_dir: Path, jobs: dict[str, str]) -> None:
        self.cluster, self.run_dir, self.jobs = cluster, run_dir, jobs

    def rows(self, stage: str = "pretrain", event: str = "") -> list[dict[str, Any]]:
        """What metrics.jsonl has by now."""
        path = self.run_dir / stage / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [row for row in rows if not event or row["event"] == event]

    @staticmethod
    def last_loss(run_dir: Path) -> float:
        """Of the last validation of pretraining."""
        lines = (run_dir / "pretrain" / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if row["event"] == "eval"][-1]

    def step(self, stage: str = "pretrain") -> int:
        return max([row["step"] for row in self.rows(stage, "train")], default=0)

    def log(self, stage: str = "pretrain") -> str:
        found = sorted((self.run_dir / "slurm").glob(f"*-{self.jobs[stage]}*.log"))
        return "\n".join(path.read_text(errors="replace") for path in found)

    def state(self, stage: str = "pretrain") -> str:
        return self.cluster.show(self.jobs[stage])["JobState"]

    def said(self, stage: str) -> str:
        """The row that `lmworks status` prints for a stage."""
        table = self.cluster.lmworks("status", str(self.run_dir)).stdout.splitlines()
        return next(line for line in table if line.startswith(f"│ {stage}"))

    def until(self, what: Callable[[], Any], limit_s: float = 240.0) -> Any:
        """Wait until something holds; fails with the job's log if it does not, or if the job ends before."""
        began = time.monotonic()
        while not (found := what()):
            if time.monotonic() - began > limit_s:
                raise AssertionError(f"not within {limit_s} s; the log:\n{self.log(next(iter(self.jobs)))}")
            time.sleep(0.05)
        return found

    def ended(self, stage: str = "pretrain", limit_s: float = 400.0) -> str:
        """The state in which a job ends."""
        return self.until(lambda: (state := self.state(stage)) in OVER and state, limit_s)

    def signal(self, stage: str = "pretrain") -> None:
        """What SLURM sends before a limit or a preemption."""
        self.cluster.call("scancel", "--signal=USR1", "--batch", self.jobs[stage])

    def restarts(self, stage: str = "pretrain") -> int:
        return int(self.cluster.show(self.jobs[stage])["Restarts"])


def corpus(folder: Path) -> Path:
    """200 text files of sentences in which each word suggests the next."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(300)]
    for number in range(200):
        at, text = draw.randrange(300), []
        for _ in range(draw.randint(8, 120)):
            at = (at * 7 + draw.randrange(3)) % 300
            text.append(words[at])
        (folder / f"{number:03d}.txt").write_text(" ".join(text))
    return folder


def tiny_tree(text: Path, run_dir: Path) -> dict[str, Any]:
    """A recipe of a model so small that starting its ranks takes longer than training it."""
    size = {"global_batch_size": 24, "micro_batch_size": 2, "eval_sequences": 16, "log_every_steps": 1}
    return {
        "run_dir": str(run_dir),
        "seed": 7,
        "prepare": {
            "sources": [{"type": "text", "paths": [str(text)]}],
            "tokenizer": {"type": "byte_level_bpe", "vocab_size": 400},
            "validation_fraction": 0.1,
        },
        "pretrain": size
        | {
            "model": {"architecture": "gpt2", "config": {"n_embd": 32, "n_layer": 2, "n_head": 2}},
            "objective": {"name": "causal_lm"},
            "data": {"sequence_length": 32},
            "max_steps": 160,
            "eval_every_steps": 80,
            "save_every_steps": 20,
        },
        "distill": size | {"student": {"every": 2}, "max_steps": 60, "eval_every_steps": 60, "save_every_steps": 20},
        "slurm": {"pretrain": {"nodes": 2}, "distill": {"nodes": 2}, "notice_s": 30, "preflight": False},
    }


# Dropout is drawn by rank, so that only without it another number of ranks gives the same numbers.
NO_DROPOUT = tuple(f"pretrain.model.config.{name}=0.0" for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"))


def weights(run_dir: Path, stage: str = "pretrain") -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run_dir / stage / "model" / "model.safetensors")


def equal(first: Path, second: Path, stage: str = "pretrain") -> bool:
    """Whether two runs made the same parameters, bit for bit."""
    import torch

    one, other = weights(first, stage), weights(second, stage)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

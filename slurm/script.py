"""The batch script of one stage as one readable text: directives, values, the site's lines, then job.sh as it is.
A pure function of what it is given; nothing here asks SLURM or the file system."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from slurm.site import Site
from trainer.slurm_config import Job, Slurm

_PLAIN = re.compile(r"[A-Za-z0-9_.,:@/+=\[\]-]+")
# Seconds that ranks get to end after the first one did: torchrun gives them 30, SLURM's KillWait 30 by default.
STRAGGLER_S = 90
# For the nodes to import torch, from a cold network disk too, and to add up once; slurm/preflight.py waits up to 60.
PREFLIGHT_S = 180
# Until srun's tasks run: where the image is fetched first, and else; assumed.
CONTAINER_START_S, START_S = 1800, 30


@dataclass(frozen=True)
class StageJob:
    """One stage as a job. Paths are absolute."""

    name: str
    stage: str
    job: Job
    slurm: Slurm
    gpus_per_node: int
    workdir: Path  # where `lmworks submit` was called: relative paths of the recipe begin here
    folder: Path  # <run_dir>/slurm
    code: Path  # the frozen copy of lmworks
    python: str
    elements: int = 0  # of a job array, each with a recipe of its own; 0: no array
    reads: tuple[Path, ...] = ()  # what must be seen in a container, beside workdir and the run folder

    @property
    def trains(self) -> bool:
        """Whether the stage takes nodes and ranks."""
        return self.stage in ("pretrain", "distill")

    @property
    def ranks_per_node(self) -> int:
        """One for each GPU, by default."""
        return self.job.ranks_per_node or (self.gpus_per_node if self.trains else 1) or 1


def render(job: StageJob, site: Site) -> str:
    """The text of the script."""
    parts = [
        "#!/usr/bin/env bash",
        *_directives(job, site),
        "",
        f"# The stage `{job.stage}` of lmworks. Values first, then what is the same in every script. Edit it, and",
        "# sbatch it by hand, as you like; the cluster's part comes from the site file, the rest from the recipe.",
        *_values(job, site),
        *_container(job, site),
        *_environment(job, site),
        "",
        common(),
    ]
    return "\n".join(parts)


def common() -> str:
    """How every script ends."""
    return resources.files("slurm").joinpath("job.sh").read_text(encoding="utf-8")


def _directives(job: StageJob, site: Site) -> Iterator[str]:
    wanted = job.job
    nodes = f"{wanted.min_nodes}-{wanted.nodes}" if wanted.min_nodes else str(wanted.nodes)
    log = "%x-%A_%a.log" if job.elements else "%x-%j.log"
    cpus = wanted.cpus_per_node or (site.cpus_per_node if job.trains else None)
    options = {
        "job-name": job.name,
        "chdir": str(job.workdir),
        "output": f"{job.folder}/".replace("%", "%%") + log,
        "open-mode": "append",
        "nodes": nodes,
        # A range with one task a node gets the fewest nodes (seen with 22.05); with as many tasks as nodes, the most.
        "ntasks" if wanted.min_nodes else "ntasks-per-node": str(wanted.nodes) if wanted.min_nodes else "1",
        # With as many tasks as nodes each may be given to any node: what a node must have is asked for by itself.
        "mincpus" if wanted.min_nodes else "cpus-per-task": cpus and str(cpus),
        "mem": wanted.memory_gib and f"{wanted.memory_gib}G",
        **_gpus(job.gpus_per_node, site),
        "time": str(wanted.time_minutes or job.slurm.time_minutes),
        "signal": f"B:USR1@{job.slurm.notice_s}",
        "array": f"0-{job.elements - 1}" if job.elements else None,
        "account": site.account,
        "partition": _partition(job, site),
        "qos": site.qos,
        "constraint": site.constraint if job.gpus_per_node else None,
        "reservation": site.reservation,
        "exclude": site.exclude,
    }
    yield from (f"#SBATCH --{name}={_directive_value(value)}" for name, value in options.items() if value)
    yield "#SBATCH --requeue"
    if site.exclusive and job.trains:
        yield "#SBATCH --exclusive"
    for option in site.directives:
        name, equals, value = option.partition("=")
        yield f"#SBATCH {name}{equals}{_directive_value(value) if value else ''}"


def _partition(job: StageJob, site: Site) -> str | None:
    return site.partition if job.gpus_per_node or not site.cpu_partition else site.cpu_partition


def _gpus(count: int, site: Site) -> dict[str, str]:
    if not count:
        return {}
    typed = f"{site.gpu_type}:{count}" if site.gpu_type else str(count)
    return {site.gpu_request: f"gpu:{typed}" if site.gpu_request == "gres" else typed}


def _directive_value(value: str) -> str:
    """Quoted as sbatch reads its lines: blanks end a value, # begins a comment; nothing is expanded."""
    if _PLAIN.fullmatch(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _values(job: StageJob, site: Site) -> Iterator[str]:
    recipe = job.folder / "recipe.yaml"
    quoted, run = shlex.quote(str(recipe)), shlex.quote(str(job.folder.parent))
    if job.elements:
        quoted = f'{shlex.quote(str(job.folder))}/recipe-"$SLURM_ARRAY_TASK_ID".yaml'
        run += '/array/"$SLURM_ARRAY_TASK_ID"'
    yield f"stage={job.stage}"
    yield f"recipe={quoted}"
    yield f"job_folder={shlex.quote(str(job.folder))}"
    steps = "unfinished/journal.jsonl" if job.stage == "prepare" else "checkpoints/LATEST"
    yield f"progress={run}/{job.stage}/{steps}"
    yield f"launch_config={shlex.quote(str(job.code / 'slurm' / 'accelerate.yaml'))}"
    yield f"python={shlex.quote(job.python)}"
    yield f"ranks_per_node={job.ranks_per_node}"
    yield f"gpus_per_node={job.gpus_per_node}"
    yield f"max_restarts={job.slurm.max_restarts}"
    yield f"notice_s={job.slurm.notice_s}"
    yield f"straggler_s={STRAGGLER_S}"
    fetches = site.container.kind == "pyxis"
    yield f"container_start_s={CONTAINER_START_S if fetches else START_S}"
    looked_at = job.trains and job.slurm.preflight and (job.job.nodes > 1 or job.gpus_per_node > 0)
    yield f"preflight_s={PREFLIGHT_S}" if looked_at else "preflight_s='' # nodes are not looked at"
    yield f"least_gb_s={site.min_all_reduce_gb_s:g}"
    yield f"fewest_nodes={job.job.fewest_nodes}"
    partition = _partition(job, site)
    yield f"partitions={_in_quotes(partition)}" if partition else "partitions=$SLURM_JOB_PARTITION"


def _container(job: StageJob, site: Site) -> Iterator[str]:
    """What stands between srun and the ranks."""
    box = site.container
    srun, prefix = [], []
    mounts = [*dict.fromkeys(map(str, (job.workdir, job.folder.parent, *job.reads))), *box.mounts]
    mounts += [site.scratch] if site.scratch else []
    if box.kind == "pyxis":
        pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
        srun = [f"--container-image={box.image}", f"--container-mounts={pairs}", f"--container-workdir={job.workdir}"]
    if box.kind == "apptainer":
        binds = [word for mount in mounts for word in ("--bind", mount)]
        nvidia = ["--nv"] if job.gpus_per_node else []
        prefix = ["apptainer", "exec", *nvidia, *binds, "--pwd", str(job.workdir), str(box.image)]
    yield f"srun_options=({' '.join(_word(word) for word in srun)})"
    yield f"container=({' '.join(_word(word) for word in prefix)})"


def _word(value: str) -> str:
    """Quoted for bash, also where only a reader could take a comma for a separator."""
    return shlex.quote(value) if "," not in value else _in_quotes(value)


def _in_quotes(value: str) -> str:
    return "'" + value.replace("'", "'\"'\"'") + "'"


def _environment(job: StageJob, site: Site) -> Iterator[str]:
    """The site's lines and variables; SLURM hands them on to the nodes."""
    yield ""
    yield from site.setup
    yield f"export PYTHONPATH={shlex.quote(str(job.code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    yield f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={job.slurm.notice_s} # else torchrun kills ranks that save after 30 s"
    yield "threads=$((${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}} / ranks_per_node))"
    yield 'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"'
    if site.network_interface:
        yield f"export NCCL_SOCKET_IFNAME={shlex.quote(site.network_interface)}"
        yield f"export GLOO_SOCKET_IFNAME={shlex.quote(site.network_interface)}"
    if site.scratch:
        yield f'export TMPDIR={shlex.quote(site.scratch)}/"$SLURM_JOB_ID"'
        on_each_node = 'srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1'
        yield f'{on_each_node} mkdir -p "$TMPDIR"'
        yield "# A job that is killed leaves it to the cluster."
        yield f"trap 'timeout 60 {on_each_node} rm -rf -- \"$TMPDIR\"' EXIT"
    for name, value in site.environment.items():
        yield f"export {name}={shlex.quote(value)}"

"""SLURM's own commands, as a login node has them: what they answer, and what they refuse as one message.
What is asked for is in the batch scripts; nothing here knows stages."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import UserError

# Job states of SLURM's documentation (squeue, "JOB STATE CODES") that a job does not leave by itself.
_OVER = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)
_LIMIT_S = 60  # a controller that does not answer for longer is down (its own timeouts are 10 s and 30 s)


def call(*command: str) -> str:
    """Output of a command; UserError with what it said if it failed."""
    done = run(command)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise UserError(f"{command[0]} refused: {said}", "what SLURM takes", f"see `man {command[0]}`, or --site")
    return done.stdout


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The finished command, whatever came of it; UserError if it is not there or does not answer."""
    if shutil.which(command[0]) is None:
        raise UserError(
            f"no {command[0]} here", "SLURM's commands", "submit from a login node, or print with --dry-run"
        )
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer in {_LIMIT_S} s", "a controller", "try later: sinfo") from None


def check(script: Path) -> None:
    """UserError if SLURM would not take the script."""
    call("sbatch", "--test-only", str(script))


def submit(script: Path, after: str | None, each: bool) -> str:
    """Submit a script to run after job `after` (each element of an array after its own); returns the job's id."""
    condition = [f"--dependency={'aftercorr' if each else 'afterok'}:{after}"] if after else []
    return call("sbatch", "--parsable", "--kill-on-invalid-dep=yes", *condition, str(script)).split(";")[0].strip()


def show(job_id: str) -> list[dict[str, str]]:
    """What the controller knows of a job, or of each element of an array; nothing if it has forgotten it.

    UserError where it does not answer: that is no sign that a job is over.
    """
    done = run(["scontrol", "show", "job", "--oneliner", job_id])
    if done.returncode and "invalid job id" not in (done.stdout + done.stderr).lower():
        raise UserError(f"scontrol show job {job_id}: {done.stderr.strip()}", "a controller", "try later: sinfo")
    lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]


def accounted(job_id: str) -> list[dict[str, str]]:
    """As `show`, from the accounting database, of a job that the controller forgot (after MinJobAge, 300 s by default);
    nothing where the cluster keeps no accounts."""
    if shutil.which("sacct") is None:
        return []
    columns = "JobID,State,NodeList"
    done = run(["sacct", "--allocations", "--duplicates", "--noheader", "--parsable2", f"--format={columns}",
                f"--jobs={job_id}"])  # fmt: skip
    rows = [line.split("|") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    starts: dict[str, list[dict[str, str]]] = {}  # of each element of an array; a requeued job has a row for each start
    for number, state, nodes in rows:
        starts.setdefault(number, []).append({"JobState": state.split()[0], "NodeList": nodes})
    return [ended[-1] | {"Restarts": str(len(ended) - 1)} for ended in starts.values()]


def unfinished(job_ids: Sequence[str]) -> list[str]:
    """Those of the jobs that are not over."""
    return [job for job in job_ids if any(facts["JobState"] not in _OVER for facts in show(job))]


def cancel(job_ids: Sequence[str]) -> None:
    """End jobs; those that are over already are left alone."""
    if job_ids:
        call("scancel", *job_ids)

"""Ranks that begin as forks of one warm process: real gloo ranks without twenty seconds of imports for each launch.

    python forked.py PLAN.json

PLAN is a list of attempts, done one after another. An attempt: {"ranks": N, "arguments": [lmworks arguments]} and
optionally "kill": {"file": metrics file, "delay_s": s} (SIGKILL to all ranks that long after the file first grows),
"freeze": {"file": metrics file, "bytes": n, "rank": r} (SIGSTOP to that rank once the file has n bytes, and SIGKILL
when the others have ended), "stop_before_step": k (as if a signal had come there), or "fault": a name in FAULTS.
Prints the exit codes of each attempt's ranks as JSON.
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from transformers import BertForMaskedLM, GPT2LMHeadModel, PreTrainedTokenizerFast  # noqa: F401 - warm

import trainer.engine.loop as loop
import trainer.pretrain
import trainer.verify  # noqa: F401 - warm
from trainer import session
from trainer.__main__ import main
from trainer.engine import fsdp2, zero_strategy
from trainer.engine.checkpoint import Checkpoints
from trainer.engine.fragments import FragmentFiles

if importlib.util.find_spec("deepspeed"):
    import deepspeed  # noqa: F401 - warm: each rank would take seconds for it


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def no_all_reduce(strategy, loss, last):
    strategy._engine.enable_backward_allreduce = False
    zero_strategy.Zero.real_backward(strategy, loss, last)


def lose_a_micro_batch(strategy, loss, last):
    if last:
        zero_strategy.Zero.real_backward(strategy, loss * 1.0, last)
    else:
        zero_strategy.Zero.real_backward(strategy, loss * 0.0, last)


def no_clipping(strategy):
    strategy._limit = float("inf")
    return fsdp2.FullyShardedDataParallel.real_step(strategy)


def forget_second_moments(files, fragments, keys):
    FragmentFiles.real_restore(files, fragments, [key for key in keys if key != "exp_avg_sq"])


def fill_disk(left_bytes):
    """From the checkpoint of step 20 to that of step 40 the disk has no more room than this."""

    def save(checkpoints, step, state, in_background=False):
        ballast = checkpoints._folder / "ballast"
        if step == 20 and checkpoints._engine.is_main:
            disk = os.statvfs(checkpoints._folder)
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_bsize - left_bytes)
        if step == 40 and checkpoints._engine.is_main:
            ballast.unlink()
        Checkpoints.real_save(checkpoints, step, state, in_background)

    return save


def fill_at_the_end(folder, model, files, shapes):
    """The disk has no more room when the model folder is written, at the first try; at the next it has."""
    ballast = folder.parent / "ballast"
    if ballast.exists():
        ballast.unlink()
    else:
        disk = os.statvfs(folder)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_bsize - 8192)
    session.real_write_model(folder, model, files, shapes)


def use_up_inodes(checkpoints, step, state, in_background=False):
    """From the checkpoint of step 20 to that of step 40 the disk takes no further file or folder."""
    folder = checkpoints._folder
    if step == 20:
        with contextlib.suppress(OSError):
            for number in range(10_000):
                (folder / f"ballast-{number}").touch()
    if step == 40:
        for path in folder.glob("ballast-*"):
            path.unlink()
    Checkpoints.real_save(checkpoints, step, state, in_background)


def show_nothing(checkpoints, partial, rank, report):
    """As where rank 0's node does not see what another node wrote."""
    if rank == 0:
        Checkpoints.real__hand_in(checkpoints, partial, rank, report)


FAULTS = {
    "no_all_reduce": (zero_strategy.Zero, "backward", no_all_reduce),
    "lost_micro_batch": (zero_strategy.Zero, "backward", lose_a_micro_batch),
    "no_clipping": (fsdp2.FullyShardedDataParallel, "step", no_clipping),
    "forgotten_moments": (FragmentFiles, "restore", forget_second_moments),
    "disk_nearly_full": (Checkpoints, "save", fill_disk(100_000)),
    "disk_full": (Checkpoints, "save", fill_disk(0)),
    "unseen_report": (Checkpoints, "_hand_in", show_nothing),
    "disk_full_at_the_end": (session, "write_model", fill_at_the_end),
    "no_inodes": (Checkpoints, "save", use_up_inodes),
}


def be_rank(rank: int, attempt: dict, port: str) -> int:
    ranks = attempt["ranks"]
    if ranks > 1:
        os.environ.update(
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        )
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    torch.set_num_threads(1)
    if "fault" in attempt:
        owner, name, faulty = FAULTS[attempt["fault"]]
        setattr(owner, f"real_{name}", getattr(owner, name))
        setattr(owner, name, faulty)
    if (stop := attempt.get("stop_before_step")) is not None:
        count = loop.count_targets

        def stopping(run, step, batches):
            counts, stopped = count(run, step, batches)
            return counts, stopped or step == stop

        loop.count_targets = stopping
    return main(attempt["arguments"])


def fork(rank: int, attempt: dict, port: str) -> int:
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = be_rank(rank, attempt, port)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def run_and_freeze(attempt: dict) -> list[int]:
    freeze = attempt["freeze"]
    port = free_port()
    pids = [fork(rank, attempt, port) for rank in range(attempt["ranks"])]
    frozen = pids[freeze["rank"]]
    while size(freeze["file"]) < freeze["bytes"]:
        time.sleep(0.01)
    os.kill(frozen, signal.SIGSTOP)
    codes = {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids if pid != frozen}
    os.kill(frozen, signal.SIGKILL)
    codes[frozen] = os.waitstatus_to_exitcode(os.waitpid(frozen, 0)[1])
    return [codes[pid] for pid in pids]


def run(attempt: dict) -> list[int]:
    if "freeze" in attempt:
        return run_and_freeze(attempt)
    kill = attempt.get("kill")
    before, deadline = size(kill["file"]) if kill else 0, float("inf")
    port = free_port()
    pids = [fork(rank, attempt, port) for rank in range(attempt["ranks"])]
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if kill and deadline == float("inf") and size(kill["file"]) > before:
            deadline = time.monotonic() + kill["delay_s"]
        if time.monotonic() >= deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    results = []
    for attempt in json.loads(Path(sys.argv[1]).read_text()):
        results.append(run(attempt))
    print(json.dumps(results))

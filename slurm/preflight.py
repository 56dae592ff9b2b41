"""Whether the nodes of a job are fit, before ranks are started: clock, disk, versions, GPUs, an all-reduce timed.
Each node writes what it found; `judge` compares them. What happens to a node that is not fit is job.sh's business."""

import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

LIMIT_S = 60  # for the nodes to find each other; assumed
_MAX_CLOCK_S = 5.0  # clocks further apart make logs and lock files of a shared disk misleading; assumed
_MIN_DISK_GIB = 1.0  # assumed: temporary files of compilers and tokenizers
_BYTES = 64 * 2**20


def probe(folder: Path, head: str, port: int, gpus: int) -> None:
    """What one node finds, in `folder`/<node>.json; written first without the all-reduce, which may never end."""
    node, rank, world = (os.environ[f"SLURM{name}"] for name in ("D_NODENAME", "_NODEID", "_NNODES"))
    path = folder / f"{node}.json"
    facts: dict[str, Any] = {"versions": _versions(), "disk_gib": _free_gib(), "gpus_wanted": gpus, "gpus": _gpus(gpus)}
    path.write_text("{}")  # its time is the file server's, the same clock for all nodes
    facts["clock_s"] = time.time() - path.stat().st_mtime
    path.write_text(json.dumps(facts))
    try:
        facts["all_reduce_gb_s"] = _all_reduce_gb_s(head, port, int(rank), int(world))
    except RuntimeError as error:  # torch's DistError and its kin
        facts["all_reduce_error"] = str(error).splitlines()[0]
    path.write_text(json.dumps(facts))


def judge(folder: Path, nodes: Sequence[str]) -> dict[str, str]:
    """Nodes that are not fit, and why."""
    found = {node: json.loads(path.read_text()) for node in nodes if (path := folder / f"{node}.json").is_file()}
    found = {node: facts for node, facts in found.items() if facts}
    if not found:
        return dict.fromkeys(nodes, "no answer")
    clock_s = statistics.median_low([facts["clock_s"] for facts in found.values()])
    usual = Counter(facts["versions"] for facts in found.values()).most_common(1)[0][0]
    faults: dict[str, str] = {}
    for node in nodes:
        facts = found.get(node)
        fault = "no answer" if facts is None else _fault(facts, clock_s, usual)
        if fault:
            faults[node] = fault
    cut = [node for node, facts in found.items() if "all_reduce_gb_s" not in facts]
    if not faults and len(cut) < len(nodes):  # if no node has one, it cannot be told whose fault that is
        faults = {node: f"no all-reduce: {found[node].get('all_reduce_error', 'not over in time')}" for node in cut}
    return faults


def summary(folder: Path) -> str:
    """One line: nodes and the slowest all-reduce."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    rates = [facts["all_reduce_gb_s"] for facts in found if facts.get("all_reduce_gb_s")]
    if len(rates) < len(found):
        return f"{len(found)} nodes, no all-reduce between them"
    return f"{len(found)} nodes, all-reduce of {_BYTES >> 20} MiB at {min(rates):.2f} GB/s"


def _fault(facts: dict[str, Any], clock_s: float, usual: str) -> str:
    if abs(facts["clock_s"] - clock_s) > _MAX_CLOCK_S:
        return f"its clock is {facts['clock_s'] - clock_s:+.1f} s off"
    if facts["disk_gib"] < _MIN_DISK_GIB:
        return f"{facts['disk_gib']:.2f} GiB free for temporary files"
    if facts["versions"] != usual:
        return "other versions of Python or its packages than on the other nodes"
    if facts["gpus"] < facts["gpus_wanted"]:
        return f"{facts['gpus']} of {facts['gpus_wanted']} GPUs"
    return ""


def _versions() -> str:
    """A hash of everything that is installed."""
    installed = sorted(f"{found.metadata['Name']} {found.version}" for found in metadata.distributions())
    return hashlib.sha256("\n".join([sys.version, *installed]).encode()).hexdigest()[:12]


def _free_gib() -> float:
    return shutil.disk_usage(tempfile.gettempdir()).free / 2**30


def _gpus(wanted: int) -> int:
    if not wanted:
        return 0
    import torch

    return torch.cuda.device_count()


def _all_reduce_gb_s(head: str, port: int, rank: int, world: int) -> float | None:
    """Bytes a ring moves past one node, in GB/s; None with one node."""
    if world == 1:
        return None
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=LIMIT_S)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    store = dist.TCPStore(head, port, world, rank == 0, timeout=limit)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                            timeout=limit)  # fmt: skip
    values = torch.ones(_BYTES // 4, device=device)
    dist.all_reduce(values)  # connects
    values.fill_(1.0)
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(values)
    right = bool((values == world).all())  # waits for the device
    seconds = time.perf_counter() - began
    dist.barrier()
    if not right:
        raise RuntimeError("the sum of an all-reduce is wrong")
    return 2 * (world - 1) / world * _BYTES / seconds / 1e9


def main(words: Sequence[str]) -> int:
    """`probe FOLDER HEAD PORT GPUS` on each node, `judge FOLDER NODE…` on one: prints the unfit ones, why on stderr."""
    folder = Path(words[1])
    if words[0] == "probe":
        probe(folder, words[2], int(words[3]), int(words[4]))
        sys.stdout.flush()
        os._exit(0)  # a gloo thread may abort in the interpreter's tear-down
    faults = judge(folder, words[2:])
    for node, fault in faults.items():
        print(f"preflight: {node} is not fit: {fault}", file=sys.stderr)
    if not faults:
        print(f"preflight: {summary(folder)}", file=sys.stderr)
    print(",".join(faults))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

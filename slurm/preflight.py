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


def probe(folder: Path, head: str, port: int, gpus: int, least_gb_s: float) -> None:
    """What one node finds, in `folder`/<node>.json; written first without the all-reduce, which may never end."""
    node, rank, world = (os.environ[f"SLURM{name}"] for name in ("D_NODENAME", "_NODEID", "_NNODES"))
    path = folder / f"{node}.json"
    facts: dict[str, Any] = {"versions": _versions(), "disk_gib": _free_gib(), "gpus_wanted": gpus, "gpus": _gpus(gpus)}
    path.write_text("{}")  # its time is the file server's, the same clock for all nodes
    facts["clock_s"] = time.time() - path.stat().st_mtime
    path.write_text(json.dumps(facts))
    try:
        facts |= _rates(head, port, int(rank), int(world), least_gb_s)
    except RuntimeError as error:  # torch's DistError and its kin
        facts["all_reduce_error"] = str(error).splitlines()[0]
    path.write_text(json.dumps(facts))


def judge(folder: Path, nodes: Sequence[str], least_gb_s: float = 0.0) -> dict[str, str]:
    """Nodes that are not fit, and why. A node is slow if no neighbour gets `least_gb_s` from it."""
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
    return faults or {node: fault for node in nodes if (fault := _slow(found[node], least_gb_s, len(nodes)))}


def summary(folder: Path, least_gb_s: float) -> str:
    """One line: nodes and the slowest all-reduce."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    rates = [facts["all_reduce_gb_s"] for facts in found if facts.get("all_reduce_gb_s")]
    if len(rates) < len(found):
        return f"{len(found)} nodes, no all-reduce between them"
    said = f"{len(found)} nodes, all-reduce of {_BYTES >> 20} MiB at {min(rates):.2f} GB/s"
    pairs = [rate for facts in found for rate in facts["pairs_gb_s"]]
    if not pairs:
        return said
    return f"{said}, less than the site's {least_gb_s:g}, but no node by itself: pairs from {min(pairs):.2f} GB/s on"


def _slow(facts: dict[str, Any], least_gb_s: float, nodes: int) -> str:
    best = max(facts.get("pairs_gb_s") or [least_gb_s])
    if best >= least_gb_s:
        return ""
    between = "all-reduce with each neighbour" if nodes > 2 else "all-reduce of the two (which one, cannot be told)"
    return f"{between} at {best:.2f} GB/s at most, less than the site's {least_gb_s:g}"


def _fault(facts: dict[str, Any], clock_s: float, usual: str) -> str:
    if abs(facts["clock_s"] - clock_s) > _MAX_CLOCK_S:
        return f"its clock is {facts['clock_s'] - clock_s:+.1f} s off"
    if facts["disk_gib"] < _MIN_DISK_GIB:
        return f"{facts['disk_gib']:.2f} GiB free for temporary files"
    if facts["versions"] != usual:
        return "other versions of Python or its packages than on the other nodes"
    if facts["gpus"] < facts["gpus_wanted"]:
        return f"{facts['gpus']} of {facts['gpus_wanted']} GPUs"
    if not facts.get("sum_is_right", True):
        return "the sum of an all-reduce is wrong there"
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


def _rates(head: str, port: int, rank: int, world: int, least_gb_s: float) -> dict[str, Any]:
    """All-reduce over all nodes, and, where that is slow, with each of the two neighbours in a ring of the nodes."""
    if world == 1:
        return {"all_reduce_gb_s": None}
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=LIMIT_S)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    store = dist.TCPStore(head, port, world, rank == 0, timeout=limit)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                            timeout=limit)  # fmt: skip
    rate, right = _all_reduce_gb_s(device, range(world), dist.group.WORLD)
    slowest = torch.tensor(rate, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MIN)
    pairs = []
    if float(slowest) < least_gb_s:
        ring = [(one, (one + 1) % world) for one in range(world if world > 2 else 1)]
        groups = [dist.new_group(pair, timeout=limit) for pair in ring]  # by all ranks, in the same order
        for turn in turns(len(ring)):
            dist.barrier()
            pairs += [_all_reduce_gb_s(device, ring[at], groups[at])[0] for at in turn if rank in ring[at]]
    dist.barrier()
    return {"all_reduce_gb_s": rate, "pairs_gb_s": pairs, "sum_is_right": right}


def turns(pairs: int) -> list[list[int]]:
    """Which neighbouring pairs of a ring are measured at once: in none of them is a node in two."""
    even = pairs - pairs % 2
    return [list(range(0, even, 2)), list(range(1, even, 2)), list(range(even, pairs))]


def _all_reduce_gb_s(device: Any, ranks: Sequence[int], group: Any) -> tuple[float, bool]:
    """Bytes a ring moves past one node, in GB/s, and whether the sum is right."""
    import torch
    import torch.distributed as dist

    values = torch.ones(_BYTES // 4, device=device)
    dist.all_reduce(values, group=group)  # connects
    values.fill_(1.0)
    dist.barrier(group=group)
    began = time.perf_counter()
    dist.all_reduce(values, group=group)
    right = bool((values == len(ranks)).all())  # waits for the device
    seconds = time.perf_counter() - began
    return 2 * (len(ranks) - 1) / len(ranks) * _BYTES / seconds / 1e9, right


def main(words: Sequence[str]) -> int:
    """`probe FOLDER LEAST_GB_S HEAD PORT GPUS` on each node; `judge FOLDER LEAST_GB_S NODE…` on one prints the unfit
    ones, and why on stderr."""
    folder, least_gb_s = Path(words[1]), float(words[2])
    if words[0] == "probe":
        probe(folder, words[3], int(words[4]), int(words[5]), least_gb_s)
        sys.stdout.flush()
        os._exit(0)  # a gloo thread may abort in the interpreter's tear-down
    faults = judge(folder, words[3:], least_gb_s)
    for node, fault in faults.items():
        print(f"preflight: {node} is not fit: {fault}", file=sys.stderr)
    if not faults:
        print(f"preflight: {summary(folder, least_gb_s)}", file=sys.stderr)
    print(",".join(faults))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

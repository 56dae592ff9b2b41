"""Which execution provider of ONNX Runtime really ran each node, read from ONNX Runtime's own profile of one call.
A session that was asked for a GPU runs what the GPU lacks on the CPU, and says nothing. What follows is `bench`'s.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.runners import CUDA_PROVIDER, TENSORRT_PROVIDER, open_onnx
from trainer.errors import UserError

_SHAPE_TYPES = {"int64", "int32", "bool"}


@dataclass(frozen=True)
class Audit:
    """Nodes by provider, and those by operator that ran elsewhere than asked. What TensorRT leaves to CUDA is as asked.

    What only reckons with shapes does not count as strayed: ONNX Runtime keeps that on the CPU by intent, as the next
    kernel's launch needs it there.
    """

    nodes: dict[str, int]
    strayed: dict[str, int]

    def reason(self, asked: str) -> str:
        """Why a row of this session must not stand beside others, or nothing."""
        if not self.strayed:
            return ""
        listed = ", ".join(f"{count} {name}" for name, count in self.strayed.items())
        return f"{sum(self.strayed.values())} of {sum(self.nodes.values())} nodes did not run on {asked}: {listed}"


def sum_of(audits: Sequence[Audit]) -> Audit:
    """One audit of several graphs that run in one call."""
    nodes, strayed = (sum((Counter(getattr(one, part)) for one in audits), Counter()) for part in ("nodes", "strayed"))
    return Audit(dict(nodes.most_common()), dict(strayed.most_common()))


def audit(path: Path, provider: str, threads: int, inputs: Mapping[str, np.ndarray]) -> Audit:
    """Run a graph file once in a session of its own, with ONNX Runtime's profiler, and see where its nodes ran."""
    with tempfile.TemporaryDirectory() as scratch:
        runner = open_onnx(path, threads, provider, profile=Path(scratch, "profile"))
        runner.run(inputs)
        events = json.loads(Path(runner.session.end_profiling()).read_text(encoding="utf-8"))
    found = read_profile(events, provider)
    if not found.nodes:
        raise UserError(f"ONNX Runtime's profile of {path.name} names no node", "one event a node", "report it to us")
    return found


def read_profile(events: Iterable[Mapping[str, Any]], provider: str) -> Audit:
    """Count the nodes of a profile; each once, however often a loop ran it."""
    nodes = {event["name"]: event["args"] for event in events if event.get("args", {}).get("provider")}
    asked = {provider, CUDA_PROVIDER} if provider == TENSORRT_PROVIDER else {provider}
    strayed = Counter(
        args["op_name"] for args in nodes.values() if args["provider"] not in asked and not _is_about_shapes(args)
    )
    return Audit(dict(Counter(args["provider"] for args in nodes.values()).most_common()), dict(strayed.most_common()))


def _is_about_shapes(args: Mapping[str, Any]) -> bool:
    """Whether all that a node puts out are whole numbers of at most one axis, as sizes and indices of axes are."""
    outputs = [pair for output in args.get("output_type_shape", []) for pair in output.items()]
    return bool(outputs) and all(kind in _SHAPE_TYPES and len(shape) <= 1 for kind, shape in outputs)

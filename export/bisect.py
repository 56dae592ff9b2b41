"""Where a form of a graph departs from the graph it was made of: the first node whose output is beyond a tolerance.
Both are run by `probe` on the same inputs; that they differ at all was the gates' finding.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from export.probe import Probe


@dataclass(frozen=True)
class Departure:
    """A node, how far its output is from the same value in the reference, and how far its inputs were."""

    node: str
    operator: str
    output: str
    relative_rms: float
    inputs_relative_rms: float
    module: str

    def __str__(self) -> str:
        place = f" in {self.module}" if self.module else ""
        return (
            f"node {self.node} ({self.operator}){place}: its output {self.output} departs by relative_rms "
            f"{self.relative_rms:.3g}, its inputs by {self.inputs_relative_rms:.3g} at most"
        )


def first_departure(
    reference: Path, candidate: Path, inputs: Mapping[str, np.ndarray], limit: float, threads: int
) -> Departure | None:
    """The first node of `candidate`, in its order, whose output differs from the reference's value of the same name.

    Quantizing and lowering keep the names of what they replace, so that all larger steps have a counterpart. None if
    every value that both have agrees within `limit`, a relative_rms.
    """
    expected = Probe(reference, threads).run(inputs)
    actual = Probe(candidate, threads).run(inputs)
    errors: dict[str, float] = {}
    for node in onnx.load(candidate, load_external_data=False).graph.node:
        before = max((errors.get(name, 0.0) for name in node.input), default=0.0)
        for name in node.output:
            if name in expected and name in actual and np.issubdtype(expected[name].dtype, np.floating):
                errors[name] = relative_rms(expected[name], actual[name])
                if not errors[name] <= limit:
                    return Departure(node.name, node.op_type, name, errors[name], before, _module(node))
            else:  # a value of the candidate's own, such as a quantized one: it is as far off as what it is made of
                errors[name] = before
    return None


def relative_rms(source: np.ndarray, actual: np.ndarray) -> float:
    """Infinite for another shape. Infinities in the same places, as masks have, are no difference."""
    if source.shape != actual.shape:
        return float("inf")
    same = np.isinf(source) & (source == actual)
    source_N, actual_N = source[~same].astype(np.float64), actual[~same].astype(np.float64)
    error, size = np.square(actual_N - source_N).sum(), np.square(source_N).sum()
    return float(np.sqrt(error / max(size, np.finfo(np.float64).tiny)))


def _module(node: onnx.NodeProto) -> str:
    """The module of the model that the exporter made a node of; empty where the file does not tell."""
    names = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
    scopes = [name for name in ast.literal_eval(names)[:-1] if name]
    return scopes[-1] if scopes else ""

"""Where a form of a graph departs from the graph it was made of, the first node whose output is beyond a tolerance, and
where a graph departs from the PyTorch model that it was traced from, the first module.
Graphs are run by `probe`, on the same inputs; that they differ at all was the gates' finding.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from export.io_spec import IoSpec
from export.probe import Probe

if TYPE_CHECKING:
    import torch


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


@dataclass(frozen=True)
class ModuleDeparture:
    """A module, and how far the graph's value of its output is from PyTorch's."""

    module: str
    kind: str
    node: str
    relative_rms: float

    def __str__(self) -> str:
        return (
            f"module {self.module} ({self.kind}): its output, of node {self.node}, departs from PyTorch's by "
            f"relative_rms {self.relative_rms:.3g}; those of all modules that end before it agree"
        )


def first_departure(
    reference: Probe, candidate: Probe, inputs: Mapping[str, np.ndarray], limit: float
) -> Departure | None:
    """The first node of `candidate`, in its order, whose output differs from the reference's value of the same name.

    Quantizing and lowering keep the names of what they replace, so that all larger steps have a counterpart. None if
    every value that both have agrees within `limit`, a relative_rms.
    """
    expected, actual = reference.run(inputs), candidate.run(inputs)
    errors: dict[str, float] = {}
    for node in candidate.nodes:
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


def first_module(
    model: "torch.nn.Module", spec: IoSpec, graph: Probe, inputs: Mapping[str, np.ndarray], limit: float
) -> ModuleDeparture | None:
    """The first module of `model` to end with another output than `graph` has for it; None if all agree.

    The graph's value is that of the last node that the exporter made of the module, where it has the same shape.
    """
    values = graph.run(inputs)
    last = {scope: node for node in graph.nodes for scope in _scopes(node)}
    for name, kind, expected in module_outputs(model, spec, inputs):
        made = [values[output] for output in last[name].output if output in values] if name in last else []
        found = next((value for value in made if value.shape == expected.shape), None)
        if found is not None and not (error := relative_rms(expected, found)) <= limit:
            return ModuleDeparture(name, kind, last[name].name, error)
    return None


def module_outputs(
    model: "torch.nn.Module", spec: IoSpec, inputs: Mapping[str, np.ndarray]
) -> list[tuple[str, str, np.ndarray]]:
    """Name, class and output (of several the first) of every module, in the order in which they end."""
    import torch

    from export.to_onnx import Traceable

    seen: list[tuple[str, str, np.ndarray]] = []

    def keep(name: str, module: torch.nn.Module, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            seen.append((name, type(module).__name__, first.numpy().copy()))

    traceable = Traceable(model, spec)
    for name, module in traceable.named_modules():
        module.register_forward_hook(lambda module, _, output, name=name: keep(name, module, output))
    with torch.inference_mode():
        traceable(*(torch.from_numpy(inputs[port.name]) for port in spec.inputs))
    return seen


def _module(node: onnx.NodeProto) -> str:
    """The module of the model that the exporter made a node of; empty where the file does not tell."""
    scopes = _scopes(node)
    return scopes[-1] if scopes else ""


def _scopes(node: onnx.NodeProto) -> list[str]:
    """The modules that a node is in, the innermost last; its own entry is left out."""
    names = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
    return [name for name in ast.literal_eval(names)[:-1] if name]

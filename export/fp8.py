"""The fp8 form of a raw graph: E4M3 numbers around its matrix products, which TensorRT then multiplies in fp8.
ONNX Runtime rounds alike and multiplies in fp32, so that the gates see the error; whether it is good enough is theirs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.files import save_graph
from export.precision import measure_ranges
from export.quantize import quantizable
from trainer.errors import GateFailed

FEWEST_OPSET = 19  # the first whose QuantizeLinear has float8
_FP8 = TensorProto.FLOAT8E4M3FN
_DTYPE = helper.tensor_dtype_to_np_dtype(_FP8)
_LARGEST = 448.0  # of E4M3 (Micikevicius et al. 2022, "FP8 formats for deep learning", table 1)
_ZERO = "fp8_zero"
_PRODUCTS = ("MatMul", "Gemm")


def round_products(raw: Path, rounded: Path, batches: Iterable[Mapping[str, np.ndarray]], threads: int) -> None:
    """Write the fp8 form of graph `raw`.

    Each tensor has one scale: an activation's from its largest magnitude in `batches`. Scales by output channel of
    weights gain little, as fp8 has many binades (relative_rms of random tiny models, BERT 0.060 against 0.061, GPT-2
    0.068 against 0.072), and TensorRT-RTX 1.7 then multiplies in fp32 where GPT-2's queries, keys and values are split.
    Attention's two products are rounded like the others: no operand is wider than those of a weight, and what is lost
    of small probabilities is small beside the large. All else stays in fp32, tables of embeddings too.
    """
    largest = measure_ranges(raw, batches, threads)
    model = quantizable(raw)
    work = _Rounding(model.graph, largest)
    for node in list(model.graph.node):
        if node.op_type in _PRODUCTS:
            work.round(node)
        work.nodes.append(node)
    work.finish()
    save_graph(model, rounded)


def check_rounded(what: str, file: Path) -> None:
    """Raise GateFailed if a product of an fp8 graph reads a number that was not rounded to fp8.

    Such a graph is nearer to its source than asked, so that no comparison of numbers would tell.
    """
    graph = onnx.load(file, load_external_data=False).graph
    types = {one.name: one.data_type for one in graph.initializer}
    rounded = {node.output[0] for node in graph.node if _makes_fp8(node, types)}
    rounded |= {name for name, type in types.items() if type == _FP8}
    widened = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in rounded}
    products = [node for node in graph.node if node.op_type in _PRODUCTS]
    wide = [node.name for node in products if not widened.issuperset(node.input[:2])]
    if wide or not products:
        raise GateFailed(
            f"{what}: {len(wide)} of {len(products)} products read numbers that are not fp8, such as {wide[:1]}",
            "every product between fp8 numbers",
            "export it again",
        )


def _makes_fp8(node: onnx.NodeProto, types: Mapping[str, int]) -> bool:
    return node.op_type == "QuantizeLinear" and types.get(node.input[2]) == _FP8


@dataclass
class _Rounding:
    """The graph while it is rewritten: each value that is multiplied is rounded once, whoever reads it."""

    graph: onnx.GraphProto
    largest: Mapping[str, float]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    rounded: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = {one.name: one for one in self.graph.initializer if one.data_type == TensorProto.FLOAT}
        self.graph.initializer.append(helper.make_tensor(_ZERO, _FP8, [], b"\0", raw=True))

    def round(self, node: onnx.NodeProto) -> None:
        """Put fp8 roundings before both factors of a product."""
        for index, name in enumerate(node.input[:2]):
            if name not in self.rounded:
                self.rounded[name] = self._weight(name) if name in self.weights else self._activation(name)
            node.input[index] = self.rounded[name]

    def finish(self) -> None:
        """Write the nodes back; fp32 weights that nobody reads any more go."""
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input} | {value.name for value in self.graph.output}
        for weight in [one for one in self.graph.initializer if one.name not in read]:
            self.graph.initializer.remove(weight)

    def _activation(self, name: str) -> str:
        scale = self._add_scale(name, self.largest[name])
        self.nodes.append(_node("QuantizeLinear", [name, scale, _ZERO], f"{name}_fp8"))
        return self._widen(name, scale)

    def _weight(self, name: str) -> str:
        weight = numpy_helper.to_array(self.weights[name])
        largest = float(np.abs(weight).max(initial=0.0))
        # What lies beyond the range would become NaN: E4M3 as ONNX has it knows no infinity.
        values = np.clip(weight / _scale(largest), -_LARGEST, _LARGEST).astype(_DTYPE)
        self.graph.initializer.append(helper.make_tensor(f"{name}_fp8", _FP8, weight.shape, values.tobytes(), raw=True))
        return self._widen(name, self._add_scale(name, largest))

    def _add_scale(self, name: str, largest: float) -> str:
        self.graph.initializer.append(numpy_helper.from_array(_scale(largest), f"{name}_fp8_scale"))
        return f"{name}_fp8_scale"

    def _widen(self, name: str, scale: str) -> str:
        self.nodes.append(_node("DequantizeLinear", [f"{name}_fp8", scale], f"{name}_rounded"))
        return f"{name}_rounded"


def _scale(largest: float) -> np.ndarray:
    """What fp8 numbers are multiplied with so that their largest is this one; of nothing but zeros 1."""
    return np.array(largest / _LARGEST if largest > 0 else 1.0, dtype=np.float32)


def _node(kind: str, inputs: list[str], output: str) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=f"node_{output}")

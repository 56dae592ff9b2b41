"""The int8 form of a raw graph, with activations quantized as they come: weight by weight, so that a large model's are
never in memory together. Whether the result is good enough is the parity gate's decision.

ONNX Runtime's own `quantize_dynamic` writes a product with the same nodes and numbers, and holds several copies of the
graph meanwhile. To an embedding table it gives a single scale, where here each row has its own.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from export.decoding_graph import for_decoding
from export.files import save_graph

# 7-bit weights: x86 CPUs without VNNI add pairs of products in 16 bits, which 8-bit weights overflow (ONNX Runtime's
# documentation, "Quantize ONNX models"). A model travels to CPUs that nobody tested, and the price is small:
# relative_rms 0.0026 to 0.0027 on a trained tiny BERT, 0.0050 to 0.0060 on GPT-2.
_LARGEST_WEIGHT = 64
_LARGEST_ENTRY = 127  # all 8 bits, as an embedding table's integers are not added up


def quantize(raw: Path, quantized: Path, fused: bool = False) -> None:
    """Write an int8 form of graph `raw`: weights of MatMul by output channel, embedding tables by row; `fused`: with
    `decoding_graph`, which is for decoding, otherwise of standard operators.

    Fusing attention without a cache (`onnxscript.rewriter.ort_fusions`) was measured and gains nothing: ONNX Runtime
    fuses the rest itself when it loads. Medians in interleaved windows, 2 threads: BERT-base 1 x 128 50.8 ms as here
    against 51.8 fused, 4 layers of GPT-2 8 x 128 27.1 against 31.6.
    """
    model = onnx.load(raw, load_external_data=False)
    if fused:
        for_decoding(model)
    graph = model.graph
    work = _Quantizing(graph, raw.parent)
    for node in list(graph.node):
        work.take(node)
    work.finish()
    for weight in graph.initializer:  # those that stay as they are: biases and norms
        if uses_external_data(weight):
            load_external_data_for_tensor(weight, str(raw.parent))
            weight.data_location = TensorProto.DEFAULT
            del weight.external_data[:]
    save_graph(model, quantized)


def round_tables(graph: onnx.GraphProto) -> None:
    """Put the embedding tables of a graph, whose weights are loaded, into int8, and leave its products."""
    work = _Quantizing(graph, Path())
    for node in list(graph.node):
        work.take_table(node)
    work.finish()


@dataclass
class _Quantizing:
    """The graph while it is rewritten. A head that multiplies by a transposed table gets its own copy of it: ONNX
    Runtime would transpose and widen the whole table at each call (measured on GPT-2: 4x slower)."""

    graph: onnx.GraphProto
    folder: Path
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    made: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = {one.name: one for one in self.graph.initializer if one.data_type == TensorProto.FLOAT}
        self.transposed = {
            node.output[0]: node.input[0]
            for node in self.graph.node
            if node.op_type == "Transpose" and node.input[0] in self.weights and self._is_matrix(node.input[0])
        }

    def take(self, node: onnx.NodeProto) -> None:
        """Add a node, or what stands for it."""
        weight = node.input[1] if node.op_type in ("MatMul", "Gemm") else ""
        if node.op_type == "MatMul" and self._is_matrix(self.transposed.get(weight, weight)):
            self._multiply(node, weight, node.output[0])
        elif node.op_type == "Gemm" and self._is_matrix(weight) and _attributes(node) <= {("transB", 1)}:
            self._multiply_and_add(node, weight)
        else:
            self.take_table(node)

    def take_table(self, node: onnx.NodeProto) -> None:
        """Add a node, its table in int8 if it reads rows of one."""
        axes = [one.i for one in node.attribute if one.name == "axis" and one.i]
        if node.op_type == "Gather" and self._is_matrix(node.input[0]) and not axes:
            self._look_up(node)
        else:
            self.nodes.append(node)

    def finish(self) -> None:
        """Write the nodes back; transpositions and fp32 weights that nobody reads any more go."""
        outputs = {value.name for value in self.graph.output}
        read = {name for node in self.nodes for name in node.input} | outputs
        kept = [node for node in self.nodes if node.output[0] not in self.transposed or node.output[0] in read]
        read = {name for node in kept for name in node.input} | outputs
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(kept)
        for weight in [one for one in self.graph.initializer if one.name not in read]:  # one by one: all anew is a copy
            self.graph.initializer.remove(weight)

    def _is_matrix(self, name: str) -> bool:
        return name in self.weights and len(self.weights[name].dims) == 2

    def _array(self, name: str) -> np.ndarray:
        if name in self.transposed:
            return numpy_helper.to_array(self.weights[self.transposed[name]], str(self.folder)).T
        return numpy_helper.to_array(self.weights[name], str(self.folder))

    def _multiply_and_add(self, node: onnx.NodeProto, weight: str) -> None:
        if _attributes(node):
            self.transposed[f"{weight}_transposed"] = weight
            weight = f"{weight}_transposed"
        if len(node.input) < 3:
            return self._multiply(node, weight, node.output[0])
        self._multiply(node, weight, f"{node.output[0]}_product")
        return self._add("Add", [f"{node.output[0]}_product", node.input[2]], node.output[0], f"{node.name}_add")

    def _multiply(self, node: onnx.NodeProto, weight: str, output: str) -> None:
        name, product = node.name, f"{output}_integers"
        value, scale, zero = self._activation(node.input[0])
        weight, weight_scale, weight_zero = self._weight(weight)
        self._add("MatMulInteger", [value, weight, zero, weight_zero], product, f"{name}_quant")
        self._add("Cast", [product], f"{product}_float", f"{name}_cast", to=TensorProto.FLOAT)
        self._add("Mul", [scale, weight_scale], f"{product}_scale", f"{name}_scales")
        self._add("Mul", [f"{product}_float", f"{product}_scale"], output, f"{name}_scaled")

    def _look_up(self, node: onnx.NodeProto) -> None:
        integers, scale = self._table(node.input[0])
        output, ids = node.output[0], node.input[1]
        self._add("Gather", [integers, ids], f"{output}_integers", node.name)
        self._add("Cast", [f"{output}_integers"], f"{output}_float", f"{node.name}_cast", to=TensorProto.FLOAT)
        self._add("Gather", [scale, ids], f"{output}_row_scale", f"{node.name}_row_scale")
        self._add("Mul", [f"{output}_float", f"{output}_row_scale"], output, f"{node.name}_scaled")

    def _activation(self, name: str) -> tuple[str, ...]:
        if ("activation", name) not in self.made:
            names = f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [name], names, name=f"{name}_quantize"))
            self.made["activation", name] = names
        return self.made["activation", name]

    def _weight(self, name: str) -> tuple[str, ...]:
        """Signed numbers around 0, a scale for each output channel."""
        if ("weight", name) not in self.made:
            weight_HV = self._array(name)
            scale_V = _scales(np.abs(weight_HV).max(axis=0), _LARGEST_WEIGHT)
            integers_HV = (weight_HV / scale_V).round().astype(np.int8)
            zero_V = np.zeros(len(scale_V), dtype=np.int8)
            names = f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"
            self._store(names, (np.ascontiguousarray(integers_HV), scale_V, zero_V))
            self.made["weight", name] = names
        return self.made["weight", name]

    def _table(self, name: str) -> tuple[str, ...]:
        """Signed numbers around 0, [V, H], and a scale for each row, [V, 1]."""
        if ("table", name) not in self.made:
            table_VH = self._array(name)
            scale_V1 = _scales(np.abs(table_VH).max(axis=1, keepdims=True), _LARGEST_ENTRY)
            integers_VH = (table_VH / scale_V1).round().astype(np.int8)
            names = f"{name}_table_quantized", f"{name}_table_scale"
            self._store(names, (integers_VH, scale_V1))
            self.made["table", name] = names
        return self.made["table", name]

    def _store(self, names: tuple[str, ...], arrays: tuple[np.ndarray, ...]) -> None:
        self.graph.initializer.extend(numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True))

    def _add(self, kind: str, inputs: list[str], output: str, name: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))


def _scales(largest: np.ndarray, integer: int) -> np.ndarray:
    """What integers are multiplied with so that `integer` is the largest value; of nothing but zeros 1."""
    scales = largest.astype(np.float64) / integer
    return np.where(scales < np.finfo(np.float32).tiny, 1.0, scales).astype(np.float32)


def _attributes(node: onnx.NodeProto) -> set[tuple[str, float]]:
    """A product's attributes that are not at their defaults (Gemm's factors are 1, its transpositions 0)."""
    values = {one.name: one.f if one.type == onnx.AttributeProto.FLOAT else one.i for one in node.attribute}
    return {(name, value) for name, value in values.items() if value != (1 if name in ("alpha", "beta") else 0)}

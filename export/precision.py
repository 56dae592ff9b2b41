"""fp16 and bf16 forms of a raw graph: weights and values in 16 bits, except where real text showed that they overflow.
Inputs and outputs stay fp32, so that one face serves every form. Whether a form is good enough is the gate's decision.
"""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.cases import Case
from export.files import save_graph
from export.io_spec import IoSpec
from export.probe import MOST_TOKENS, Probe
from export.runners import CPU_PROVIDER, Pair, Runner, open_onnx_graphs
from trainer.errors import GateFailed, UserError

# A value may become so much larger on other text than it was on the calibration's (assumed).
HEADROOM = 4.0
_FP16_MAX = float(np.finfo(np.float16).max)
_BF16_MAX = np.float32((2 - 2**-7) * 2.0**127)  # bfloat16 has 8 bits of significand, and fp32's exponents
# Below this, fp16 keeps fewer bits the smaller a number is (IEEE 754 binary16's smallest normal number).
_FP16_SMALLEST = float(np.finfo(np.float16).smallest_normal)
_DTYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def measure_ranges(raw: Path, batches: Iterable[Mapping[str, np.ndarray]], threads: int) -> dict[str, float]:
    """Largest finite magnitude of each float value of graph `raw`, its inputs too; infinities stay what they are."""
    probe = Probe(raw, threads)
    largest: dict[str, float] = {}
    for batch in batches:
        for name, value in {**batch, **probe.run(batch)}.items():
            if value.dtype == np.float32 and value.size:
                finite = np.abs(value[np.isfinite(value)])
                largest[name] = max(largest.get(name, 0.0), float(finite.max(initial=0.0)))
    return largest


def overflowing(raw: Path, largest: Mapping[str, float]) -> set[str]:
    """Names of nodes that fp16 cannot compute: an input or output beyond its range, or all of an output below it.

    A Gemm or MatMul sums in fp32 on tensor cores and CPUs, so that its inputs and outputs are all there is to ask for.
    """
    graph = onnx.load(raw).graph
    largest = {**largest, **_weights(graph)}
    kept = set()
    for node in graph.node:
        touched = [largest[name] for name in (*node.input, *node.output) if name in largest]
        faint = [largest[name] for name in node.output if 0 < largest.get(name, 0) < _FP16_SMALLEST]
        if faint or any(value * HEADROOM > _FP16_MAX for value in touched):
            kept.add(node.name)
    return kept


def check_overflow(what: str, file: Path, cases: Iterable[Case], threads: int) -> None:
    """Raise GateFailed if a node of a lowered graph makes values that are not finite of inputs that are.

    The outputs alone would not tell: ONNX Runtime's CPU provider has few fp16 operators, computes the others in fp32
    and leaves rounding out between them. Here every value is asked for in the type that the graph gives it.
    """
    probe, graph = Probe(file, threads), onnx.load(file).graph
    weights = {one.name: _finite(numpy_helper.to_array(one)) for one in graph.initializer}
    for case in cases:
        if case.inputs["input_ids"].size > MOST_TOKENS:
            continue
        values = {**case.inputs, **probe.run(case.inputs)}
        finite = {**weights, **{name: _finite(value) for name, value in values.items()}}
        for node in graph.node:
            if all(finite[name] for name in node.input if name):
                wrong = [name for name in node.output if not finite.get(name, True)]
                if wrong:
                    raise GateFailed(
                        f"{what}: case {case.name}: node {node.name} ({node.op_type}) overflows in {wrong[0]}",
                        "finite values inside",
                        "raise export.calibration.batches, so that its range is seen and it is kept in fp32",
                    )


def _finite(value: np.ndarray) -> bool:
    return value.dtype.kind in "iub" or bool(np.isfinite(value).all())


def _weights(graph: onnx.GraphProto) -> dict[str, float]:
    values = {one.name: numpy_helper.to_array(one) for one in graph.initializer if one.data_type == TensorProto.FLOAT}
    return {name: float(np.abs(value[np.isfinite(value)]).max(initial=0.0)) for name, value in values.items()}


def lower(raw: Path, lowered: Path, precision: str, kept: set[str]) -> set[str]:
    """Write graph `raw` in "fp16" or "bf16", the `kept` nodes in fp32; returns all that make fp32 numbers.

    Those that the operator set defines for no such type stay, too (Sin and Cos take bf16 from opset 22 on), and so does
    what the models themselves compute in fp32: angles of rotary positions, and norms by the root of the mean square.
    """
    model = onnx.load(raw)
    low = _DTYPES[precision]
    kept = kept | _without_form(model, low) | _angles(model.graph) | _root_mean_squares(model.graph)
    work = _Lowering(model.graph, element_types(raw), low, kept)
    for node in list(model.graph.node):
        work.take(node)
    work.finish()
    save_graph(model, lowered)
    return work.left


@contextlib.contextmanager
def runnable(file: Path, variant: str, provider: str) -> Iterator[Path]:
    """The file to open for a form. ONNX Runtime's CPU provider cannot run bf16: there it is another graph, which
    computes in fp32 and rounds each value that the form holds in bf16."""
    if variant != "bf16" or provider != CPU_PROVIDER:
        yield file
        return
    with tempfile.TemporaryDirectory() as scratch:
        twin = Path(scratch, file.name)
        _write_rounding(file, twin)
        yield twin


def open_form(
    files: Sequence[Path], variant: str, spec: IoSpec, threads: int, provider: str = CPU_PROVIDER
) -> Runner | Pair:
    """What `open_onnx_graphs` gives, of a form that the provider may be unable to run."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(runnable(file, variant, provider)) for file in files]
        return open_onnx_graphs(opened, spec, threads, provider)


def _write_rounding(file: Path, twin: Path) -> None:
    types, model = element_types(file), onnx.load(file)
    graph, nodes = model.graph, []
    for weight in graph.initializer:
        if weight.data_type == TensorProto.BFLOAT16:
            weight.CopyFrom(_widened(weight))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            elif attribute.name == "value" and attribute.t.data_type == TensorProto.BFLOAT16:
                attribute.t.CopyFrom(_widened(attribute.t))
        nodes.append(node)
        for index, name in enumerate(node.output):
            if types.get(name) == TensorProto.BFLOAT16:
                exact, rounded = f"{name}_exact", f"{name}_rounded"
                node.output[index] = exact
                nodes.append(helper.make_node("Cast", [exact], [rounded], name=rounded, to=TensorProto.BFLOAT16))
                nodes.append(helper.make_node("Cast", [rounded], [name], name=f"{name}_widened", to=TensorProto.FLOAT))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)
    save_graph(model, twin)


def _widened(weight: onnx.TensorProto) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float32), weight.name)


def _without_form(model: onnx.ModelProto, low: int) -> set[str]:
    """Nodes whose operator takes fp32 but not the lower type, by the schemas of the model's operator set."""
    version = next(one.version for one in model.opset_import if one.domain == "")
    lower_name = f"tensor({helper.tensor_dtype_to_string(low).removeprefix('TensorProto.').lower()})"
    found = set()
    for node in model.graph.node:
        allowed = {name for one in _schema(node, version).type_constraints for name in one.allowed_type_strs}
        if "tensor(float)" in allowed and lower_name not in allowed:
            found.add(node.name)
    return found


def _angles(graph: onnx.GraphProto) -> set[str]:
    """Sines and cosines, and all that makes their angles of positions: fp16 has whole numbers alone above 1024."""
    found, read = set(), set()
    for node in reversed(graph.node):
        if node.op_type in ("Sin", "Cos") or read.intersection(node.output):
            found.add(node.name)
            read.update(node.input)
    return found


def _root_mean_squares(graph: onnx.GraphProto) -> set[str]:
    """Nodes of x / sqrt(mean(x²) + epsilon).

    In 16 bits ONNX Runtime (1.30) makes one node of them that has an epsilon of 1e-5, whatever the graph's is.
    """
    makers = {output: node for node in graph.node for output in node.output}
    roots: dict[str, onnx.NodeProto] = {node.output[0]: node for node in graph.node if node.op_type == "Sqrt"}
    found = {node.name for node in graph.node if node.op_type == "Div" and node.input[1] in roots}
    for root in roots.values():
        node: onnx.NodeProto | None = root
        for kind in ("Sqrt", "Add", "ReduceMean", "Pow"):
            if node is None or node.op_type != kind:
                break
            found.add(node.name)
            node = makers.get(node.input[0])
    return found


def _schema(node: onnx.NodeProto, version: int) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(node.op_type, version, node.domain)


def element_types(raw: Path) -> dict[str, int]:
    """Element type of every value of a graph file. Weights beside it are not needed, and may be too large to read."""
    model = onnx.load(raw, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {one.name: one.data_type for one in inferred.initializer}
    unknown = [name for node in inferred.node for name in node.output if name and not types.get(name)]
    if unknown:
        raise UserError(f"the type of value {unknown[0]} is not known", "a graph whose types onnx infers")
    return types


@dataclass
class _Lowering:
    """The graph while it is rewritten: each float value lives in one form, and is cast where the other is asked for."""

    graph: onnx.GraphProto
    types: Mapping[str, int]
    low: int
    kept: set[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    lives_low: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    cast: dict[tuple[str, bool], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = {one.name: one for one in self.graph.initializer if one.data_type == TensorProto.FLOAT}
        self.outputs = {value.name for value in self.graph.output}
        self.added: list[onnx.TensorProto] = []

    def take(self, node: onnx.NodeProto) -> None:
        """Put a node's inputs into the form that it works in, and note in which its outputs live."""
        low = node.name not in self.kept
        for index, name in enumerate(node.input):
            if self.types.get(name) == TensorProto.FLOAT:
                node.input[index] = self.in_form(name, low)
        made = [name for name in node.output if self.types.get(name) == TensorProto.FLOAT]
        if low and made:
            _make_low(node, self.low)
        elif made:
            self.left.add(node.name)
        self.nodes.append(node)
        for name in made if low else ():
            self.lives_low.add(name)
            if name in self.outputs:
                self._rename_output(node, name)

    def in_form(self, name: str, low: bool) -> str:
        """A name under which value `name` is there in 16 bits, or in fp32."""
        if low == (name in self.lives_low):
            return self.cast.get((name, low), name)
        if (name, low) not in self.cast:
            self.cast[name, low] = f"{name}_{'low' if low else 'fp32'}"
            if name in self.weights:
                self.added.append(_lowered_weight(self.weights[name], self.cast[name, low], self.low))
            else:
                self._add_cast(name, self.cast[name, low], self.low if low else TensorProto.FLOAT)
        return self.cast[name, low]

    def finish(self) -> None:
        """Write nodes and weights back; fp32 weights that nobody reads any more go."""
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input} | self.outputs
        weights = [one for one in (*self.graph.initializer, *self.added) if one.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(weights)

    def _rename_output(self, node: onnx.NodeProto, name: str) -> None:
        """The graph's output stays fp32: what the node makes gets another name, and is cast to it."""
        inner = f"{name}_inner"
        node.output[list(node.output).index(name)] = inner
        self.cast[name, True] = inner
        self.cast[name, False] = name
        self._add_cast(inner, name, TensorProto.FLOAT)

    def _add_cast(self, source: str, target: str, to: int) -> None:
        self.nodes.append(helper.make_node("Cast", [source], [target], name=f"cast_to_{target}", to=to))


def _make_low(node: onnx.NodeProto, low: int) -> None:
    """Types that a node's attributes name: what it casts to, and constants that it holds."""
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = low
        elif attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_lowered_weight(attribute.t, attribute.t.name, low))


def _lowered_weight(weight: onnx.TensorProto, name: str, low: int) -> onnx.TensorProto:
    value = numpy_helper.to_array(weight)
    if low == TensorProto.BFLOAT16 and value.size == 1 and np.isfinite(value).all():
        value = value.clip(-_BF16_MAX, _BF16_MAX)  # masks' least fp32 number would be rounded to minus infinity
    with np.errstate(over="ignore"):  # beyond the range it becomes infinite, for the gate to see
        return numpy_helper.from_array(value.astype(helper.tensor_dtype_to_np_dtype(low)), name)

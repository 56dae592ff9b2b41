"""A decoder's graph as ONNX Runtime's CPU provider generates with it.

Attention is one node, GroupQueryAttention, which reads a cache where it lies and may write to it: the plain graph
copies all keys and values of the past at each step, and with fewer heads of keys than of queries once more for each of
these. Rotary positions are one node, too. Logits are made of as many of the last tokens as the caller names, of all by
default.
Which forms take it is `variants`' business; who hands the same buffers in and out is `generate`'s.

Names, types and axes of inputs and outputs stay as they are. What changes is that the length of the past is that of the
mask less that of the tokens: the tensors of a past may be longer, and those of the present are the same ones then; a
mask that was not made longer with the past is not noticed. The node is the CPU provider's in fp32 (CUDA's has 16 bits
alone), and takes several tokens after a past for one text only.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.files import save_graph
from export.io_spec import LOGITS_TO_KEEP, ROOM_IN_PAST
from trainer.errors import UserError

_TO_HEADS = [0, 2, 1, 3]  # [B, T, H, D] to [B, H, T, D], and back
_LAST_TWO = [0, 1, 3, 2]
_ROWS, _LENGTH = 0, 2  # axes of a past
_REPEATS = ("Unsqueeze", "Expand", "Reshape")  # of keys and values, for the heads of queries that share them
_DOMAIN = "com.microsoft"


class _Unlike(Exception):
    """A graph is not what torch's exporter makes of scaled_dot_product_attention with a cache."""

    def __str__(self) -> str:
        return super().__str__() or "its attention is none that torch's exporter writes"


@dataclass(frozen=True)
class _Layer:
    """The values that one layer's attention takes and gives."""

    query: str
    """[B, H, T, D], as `key` and `value` of the new tokens, with heads of their own."""
    key: str
    value: str
    past: tuple[str, str]
    present: tuple[str, str]
    mask: str
    """What is added to scores, [B, 1, T, P + T]: 0 or, where a query does not attend, the least number."""
    scale: float
    result: onnx.NodeProto
    """The node that puts out [B, T, H * D]."""


def write_fused(raw: Path, file: Path) -> None:
    """Write the fp32 form of graph `raw`; UserError for a graph that `for_decoding` leaves as it is."""
    model = onnx.load(raw)
    try:
        _rewrite(model)
    except _Unlike as unlike:
        raise UserError(
            f"there is no fp32_fused of {raw.name}: {unlike}", "another model", "take fp32 for it"
        ) from None
    save_graph(model, file)


def for_decoding(model: onnx.ModelProto) -> bool:
    """Rewrite a model in place; weights need not be loaded. False, and nothing is changed, if it has no cache of its
    own or any of its layers looks otherwise than those that torch's exporter writes."""
    try:
        _rewrite(model)
    except _Unlike:
        return False
    return True


def has_room(file: Path) -> bool:
    """Whether a file holds such a graph."""
    return any(entry.key == ROOM_IN_PAST for entry in onnx.load(file, load_external_data=False).metadata_props)


def _rewrite(model: onnx.ModelProto) -> None:
    work = _Graph(model.graph)
    layers = work.layers()
    work.fuse(layers)
    _keep_logits_on_request(model.graph)
    if all(one.domain != _DOMAIN for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    model.metadata_props.add(key=ROOM_IN_PAST, value="true")


@dataclass(frozen=True)
class _Rotation:
    value: str
    """[B, H, T, D], before its positions turn it."""
    angles: str
    """[B, T, D / 2]."""


@dataclass
class _Graph:
    graph: onnx.GraphProto
    front: list[onnx.NodeProto] = field(default_factory=list)
    """Nodes to be put before all others."""
    tabulated: set[str] = field(default_factory=set)
    """Angles of which there are tables."""

    def __post_init__(self) -> None:
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.weights = {weight.name: weight for weight in self.graph.initializer}
        self.shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*self.graph.value_info, *self.graph.input)
        }

    def layers(self) -> list[_Layer]:
        """All of them; raises _Unlike for the first that is another."""
        inputs = {value.name for value in self.graph.input}
        keys = [value.name for value in self.graph.output if value.name.endswith(".key")]
        if not keys or not {"input_ids", "attention_mask"} <= inputs:  # an encoder-decoder's tells nobody its length
            raise _Unlike("it has no cache of its own")
        self._made("logits", "MatMul")
        found = [self._layer(name, f"{name.removesuffix('key')}value") for name in keys]
        joins = {name for layer in found for name in layer.present}
        for past in (past for layer in found for past in layer.past):
            others = [node for node in self.readers[past] if not joins.intersection(node.output)]
            if past not in inputs or any(_axis_of_shape(node) not in (_ROWS, _LENGTH) for node in others):
                raise _Unlike("somebody reads more of a past than its shape")
        return found

    def _layer(self, key: str, value: str) -> _Layer:
        joined = [self._made(name, "Concat") for name in (key, value)]
        product = self._reader_through_repeats(value)
        scores = self._made(product.input[0], "Softmax").input[0]
        masked = self._made(scores, "Add")
        queries, keys = self._made(masked.input[0], "MatMul").input
        scaled_query, scaled_key = self._made(queries, "Mul"), self._made(keys, "Mul")
        turned = self._made(scaled_key.input[0], "Transpose", _LAST_TWO)
        if self._before_repeats(turned.input[0]) != key:
            raise _Unlike
        result = self._only_reader(self._only_reader(product.output[0], "Transpose", _TO_HEADS).output[0], "Reshape")
        allowed = [self._number(name) for name in self._made(masked.input[1], "Where").input[1:]]
        layer = _Layer(
            query=scaled_query.input[0],
            key=joined[0].input[1],
            value=joined[1].input[1],
            past=(joined[0].input[0], joined[1].input[0]),
            present=(key, value),
            mask=masked.input[1],
            scale=self._number(scaled_query.input[1]) * self._number(scaled_key.input[1]),
            result=result,
        )
        heads, key_heads, value_heads = map(self._heads, (layer.query, layer.key, layer.value))
        if (size := self._size(layer.query)) % 8:
            raise _Unlike(f"its heads have {size} numbers, and the operator takes a multiple of 8")
        # Minus infinity would leave a row of padding, which attends to nothing, without any number.
        if key_heads != value_heads or heads % key_heads or allowed != [0.0, float(np.finfo(np.float32).min)]:
            raise _Unlike
        return layer

    def fuse(self, layers: Sequence[_Layer]) -> None:
        """Put the new nodes in place of those that made the results, and leave out what nobody reads any more."""
        self._lengths(layers)
        fused = {id(layer.result): self._fused(index, layer) for index, layer in enumerate(layers)}
        joins = {name for layer in layers for name in layer.present}
        kept = [node for node in self.graph.node if not joins.intersection(node.output)]
        nodes = [new for node in kept for new in fused.get(id(node), [node])]
        read, needed = {value.name for value in self.graph.output}, []
        for node in reversed(self.front + nodes):
            if read.intersection(node.output):
                read.update(node.input)
                needed.append(node)
        del self.graph.node[:]
        self.graph.node.extend(reversed(needed))
        for index, weight in reversed(list(enumerate(self.graph.initializer))):
            if weight.name not in read:
                del self.graph.initializer[index]

    def _lengths(self, layers: Sequence[_Layer]) -> None:
        """The lengths that the operator wants, and that of the past, from the mask and the tokens."""
        one, first = self._constant("one", np.array([1], np.int32)), self._constant("first", np.array(0, np.int64))
        total, new = (
            self._own("Shape", "attention_mask", start=1, end=2),
            self._own("Shape", "input_ids", start=1, end=2),
        )
        past, total_int32 = self._own("Sub", total, new), self._own("Cast", total, to=TensorProto.INT32)
        self.total = self._own("Gather", total_int32, first)
        rows = self._own("Shape", "input_ids", start=0, end=1)
        self.last = self._own("Expand", self._own("Sub", total_int32, one), rows)
        pasts = {name for layer in layers for name in layer.past}
        for node in self.graph.node:
            if pasts.intersection(node.input) and _axis_of_shape(node) == _LENGTH:
                node.CopyFrom(helper.make_node("Identity", [past], node.output, name=node.name))

    def _fused(self, index: int, layer: _Layer) -> list[onnx.NodeProto]:
        """The operator, and before it what brings its inputs to [B, T, H * D]."""
        nodes: list[onnx.NodeProto] = []
        inputs = [self._flat(name, nodes) for name in (layer.query, layer.key, layer.value)]
        split = self.makers.get(inputs[0])
        if split is not None and split.op_type == "Split" and inputs == list(split.output):
            inputs = [split.input[0], "", ""]
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [*inputs, *layer.past, self.last, self.total, "", "", "", layer.mask],
                [layer.result.output[0], *layer.present],
                name=f"attention_{index}",
                domain=_DOMAIN,
                num_heads=self._heads(layer.query),
                kv_num_heads=self._heads(layer.key),
                scale=layer.scale,
            )
        )
        for name in ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy"):
            for entry in layer.result.metadata_props:
                if entry.key == name:
                    nodes[-1].metadata_props.add(key=name, value=entry.value)
        return nodes

    def _flat(self, name: str, nodes: list[onnx.NodeProto]) -> str:
        """[B, T, H * D] of a value [B, H, T, D], turned by its positions if that is how it was made."""
        try:
            rotation = self._rotation(name)
        except _Unlike:
            return self._unturned(name, nodes)
        flat = self._unturned(rotation.value, nodes)
        inputs = [flat, *self._tables(rotation.angles, nodes)]
        nodes.append(
            helper.make_node("RotaryEmbedding", inputs, [f"{name}_flat"], name=f"{name}_rotate", domain=_DOMAIN)
        )
        return f"{name}_flat"

    def _unturned(self, name: str, nodes: list[onnx.NodeProto]) -> str:
        """[B, T, H * D] of a value [B, H, T, D]: what it was made of, if nothing but its axes was changed since."""
        shape = self._constant(f"width_{self._heads(name)}", np.array([0, 0, self._heads(name) * self._size(name)]))
        turn = self.makers.get(name)
        if turn is not None and turn.op_type == "Transpose" and _permutation(turn) == _TO_HEADS:
            before = turn.input[0]
            reshape = self.makers.get(before)
            if reshape is not None and reshape.op_type == "Reshape" and len(self.shapes.get(reshape.input[0], [])) == 3:
                return reshape.input[0]
        else:
            before = f"{name}_turned"
            nodes.append(helper.make_node("Transpose", [name], [before], name=f"{name}_turn", perm=_TO_HEADS))
        nodes.append(helper.make_node("Reshape", [before, shape], [f"{name}_unturned"], name=f"{name}_flatten"))
        return f"{name}_unturned"

    def _rotation(self, name: str) -> _Rotation:
        """How a value came out of x * cos + (-x2, x1) * sin, x1 and x2 being the halves of x."""
        plain, crossed = (self._made(one, "Mul") for one in self._made(name, "Add").input)
        minus_second, first = self._made(crossed.input[0], "Concat").input
        halves = [self._made(first, "Slice"), self._made(self._made(minus_second, "Neg").input[0], "Slice")]
        value, size = plain.input[0], self._size(plain.input[0])
        if any(len(node.input) != 5 for node in halves):
            raise _Unlike
        starts, ends, axes, steps = ([self._integers(node.input[place]) for node in halves] for place in (1, 2, 3, 4))
        if [starts, axes, steps] != [[[0], [size // 2]], [[3], [3]], [[1], [1]]] or min(ends[1]) < size:
            raise _Unlike
        angles = {self._angles(plain.input[1], "Cos"), self._angles(crossed.input[1], "Sin")}
        if ends[0] != [size // 2] or {node.input[0] for node in halves} != {value} or len(angles) > 1:
            raise _Unlike
        self._heads(value)
        return _Rotation(value, angles.pop())

    def _angles(self, name: str, wave: str) -> str:
        """What the cosine or sine of [B, 1, T, D] was made of: [B, T, D / 2], twice beside itself."""
        unsqueezed = self._made(name, "Unsqueeze")
        angles = self._made(self._made(unsqueezed.input[0], wave).input[0], "Concat").input
        if (
            self._integers(unsqueezed.input[1]) != [1]
            or len(set(angles)) > 1
            or len(self.shapes.get(angles[0], [])) != 3
        ):
            raise _Unlike
        return angles[0]

    def _tables(self, angles: str, nodes: list[onnx.NodeProto]) -> list[str]:
        """A row for each token of the batch, which the operator looks up by position: [B, T] places in the tables, and
        cosines and sines, [B * T, D / 2]. So there is no last position."""
        names = [f"{angles}_{which}" for which in ("places", "cosines", "sines")]
        if angles not in self.tabulated:
            self.tabulated.add(angles)
            shape = self._constant("table", np.array([-1, self.shapes[angles][2]]))
            for kind, name in (("Cos", names[1]), ("Sin", names[2])):
                nodes.append(helper.make_node(kind, [angles], [f"{name}_each"], name=f"{name}_each"))
                nodes.append(helper.make_node("Reshape", [f"{name}_each", shape], [name], name=name))
            none, one = (self._constant(name, np.array(value)) for name, value in (("none", 0), ("step", 1)))
            count = self._own("Range", none, self._own("Size", "input_ids"), one)
            self.front.append(
                helper.make_node("Reshape", [count, self._own("Shape", "input_ids")], [names[0]], name=names[0])
            )
        return names

    def _made(self, name: str, kind: str, permutation: list[int] | None = None) -> onnx.NodeProto:
        """The node of this kind that makes a value."""
        node = self.makers.get(name)
        if node is None or node.op_type != kind or (permutation and _permutation(node) != permutation):
            raise _Unlike
        return node

    def _only_reader(self, name: str, kind: str, permutation: list[int] | None = None) -> onnx.NodeProto:
        readers = self.readers[name]
        if len(readers) != 1 or readers[0].op_type != kind or (permutation and _permutation(readers[0]) != permutation):
            raise _Unlike
        return readers[0]

    def _reader_through_repeats(self, name: str) -> onnx.NodeProto:
        """The product by values, which may be repeated for it."""
        while len(readers := self.readers[name]) == 1:
            if readers[0].op_type == "MatMul" and readers[0].input[1] == name:
                return readers[0]
            if readers[0].op_type not in _REPEATS:
                break
            name = readers[0].output[0]
        raise _Unlike

    def _before_repeats(self, name: str) -> str:
        while (node := self.makers.get(name)) is not None and node.op_type in _REPEATS:
            name = node.input[0]
        return name

    def _number(self, name: str) -> float:
        weight = self.weights.get(name)
        if weight is None or weight.dims:
            raise _Unlike
        return float(numpy_helper.to_array(weight))

    def _integers(self, name: str) -> list[int]:
        weight = self.weights.get(name)
        if weight is None:
            raise _Unlike
        return numpy_helper.to_array(weight).tolist()

    def _heads(self, name: str) -> int:
        return self._fixed_axis(name, 1)

    def _size(self, name: str) -> int:
        return self._fixed_axis(name, 3)

    def _fixed_axis(self, name: str, axis: int) -> int:
        shape = self.shapes.get(name, [])
        if len(shape) != 4 or not shape[axis]:
            raise _Unlike
        return shape[axis]

    def _constant(self, name: str, value: np.ndarray) -> str:
        name = f"attention_{name}"
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.asarray(value), name)
            self.graph.initializer.append(self.weights[name])
        return name

    def _own(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"attention_{kind.lower()}_{len(self.front)}"
        self.front.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output


def _keep_logits_on_request(graph: onnx.GraphProto) -> None:
    """Give the product that puts out logits the last tokens only. Their number is an input that need not be given, as
    it has a value, 0 for all of them: int64 without axes, under transformers.js's name."""
    place, product = next((index, node) for index, node in enumerate(graph.node) if "logits" in node.output)
    numbers = {LOGITS_TO_KEEP: 0, "logits_one": [1], "logits_end": [np.iinfo(np.int64).max], "logits_axis": [1]}
    for name, value in numbers.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    graph.input.append(helper.make_tensor_value_info(LOGITS_TO_KEEP, TensorProto.INT64, []))
    number = helper.make_node("Reshape", [LOGITS_TO_KEEP, "logits_one"], ["logits_number"], name="logits_number")
    first = helper.make_node("Neg", ["logits_number"], ["logits_first"], name="logits_first")
    ends = [product.input[0], "logits_first", "logits_end", "logits_axis"]
    kept = helper.make_node("Slice", ends, ["logits_of"], name="logits_of")
    product.input[0] = "logits_of"
    for node in (kept, first, number):
        graph.node.insert(place, node)


def _axis_of_shape(node: onnx.NodeProto) -> int | None:
    """The one axis whose length a node gives."""
    span = {attribute.name: attribute.i for attribute in node.attribute}
    alone = node.op_type == "Shape" and span.get("end") == span.get("start", 0) + 1
    return span.get("start", 0) if alone else None


def _permutation(node: onnx.NodeProto) -> list[int]:
    return next((list(one.ints) for one in node.attribute if one.name == "perm"), [])

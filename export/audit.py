"""What an engine really computes in: its layers, read back from the library, held against the precision that was asked.
Building engines is `to_tensorrt`'s; nothing here imports TensorRT.

A library describes each layer in one line (its engine inspector's ONELINE format, which the builder also logs).
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import GateFailed

# Layers that multiply matrices, as TensorRT-RTX 1.7 was seen to name them and TensorRT's documentation does: by kind
# (`runtime_fusion` is a product with what follows it), and fused attention, which is of kind kgen, by name. The others
# (kgen, shape_call, shuffle …) move and add. `gemv_mha` is attention of a single new token.
_MATRIX_KINDS = re.compile(r"gemm|matrix|fc|conv|fusion|mha|attention", re.IGNORECASE)
_MATRIX_NAMES = re.compile(r"_+(gemm|gemv|mha|myl_Fc)")
# Attention as one layer reads, beside its factors, what is added to scores, in fp32: a mask or T5's distances, [batch,
# heads, queries, keys]. Factors that are no cache are [batch * heads, tokens, size], of a single token [batch, width].
_ATTENTION, _AXES_OF_SCORES = "_mha_", 4
# A cache is fp32 at the graph's face in every form. A layer of attention that reads it directly holds the graph's cast
# of it, too, so that the cache's type tells nothing of the product's.
_CACHE = re.compile(r"past_key_values\.\d+\.(\w+\.)?(key|value)( \[profile \d+\])?")
# The library's names of types, in either spelling, to ours.
_TYPES = {
    "float": "fp32",
    "fp32": "fp32",
    "half": "fp16",
    "fp16": "fp16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "fp8": "fp8",
    "e4m3": "fp8",
    "int8": "int8",
    "int4": "int4",
    "fp4": "fp4",
}
# Precision of a variant to the types in which its matrices may be multiplied. A product of two activations (scores of
# attention) has no weight that was quantized, so that it stays in the type that the graph computes in; of fp8 it is
# rounded, too (`fp8`), and a weight that was widened before its product looks like an activation.
_WEIGHT_TYPES = {
    "fp32": {"fp32"},
    "fp16": {"fp16"},
    "bf16": {"bf16"},
    "int8_static": {"int8"},
    "fp8": {"fp8"},
    "int4": {"int4", "fp16", "bf16"},  # weights are made fp16 or bf16 right before the product
}
_ACTIVATION_TYPES = _WEIGHT_TYPES | {
    name: _WEIGHT_TYPES[name] | {"fp16", "bf16", "fp32"} for name in ("int8_static", "int4")
}
_LINE = re.compile(
    r"^\s*Name: (?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\]"
    r"(?:, Constants: \[(?P<constants>.*?)\])?, Outputs: \[.*?\], (?P<rest>(?:TacticName|ParameterType|StreamId).*)$"
)
_TENSOR = re.compile(
    r"Name: (?P<name>[^,]*),[^{}]*?Dimensions: \[(?P<dims>[-\d,]*)\][^{}]*?(?:Format/)?Datatype: (?P<type>[^,}]+)"
)


@dataclass(frozen=True)
class Operand:
    """A tensor that a layer reads; -1 is a free axis."""

    dims: tuple[int, ...]
    type: str
    is_cache: bool = False

    @property
    def is_matrix(self) -> bool:
        return sum(axis != 1 for axis in self.dims) >= 2


@dataclass(frozen=True)
class Layer:
    """One layer of an engine, and the nodes of the graph that went into it."""

    name: str
    kind: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    nodes: tuple[str, ...]

    @property
    def is_product(self) -> bool:
        return bool(_MATRIX_KINDS.search(self.kind) or _MATRIX_NAMES.match(self.name))

    @property
    def weights(self) -> tuple[Operand, ...]:
        return tuple(one for one in self.constants if one.is_matrix)

    @property
    def types(self) -> set[str]:
        """Types of what is multiplied: the weights, or of two activations both. A mask or an index is no factor."""
        factors = self.weights or self.inputs
        if _ATTENTION in self.name and not self.weights:
            factors = [one for one in self.inputs if one.is_cache or len(one.dims) != _AXES_OF_SCORES] or self.inputs
        telling = [one for one in factors if not one.is_cache] or factors
        return {one.type for one in telling} - {"bool", "int32", "int64"}


def read_layers(text: str) -> list[Layer]:
    """The layers that a library's description names, of all profiles."""
    return [_layer(found) for line in text.splitlines() if (found := _LINE.match(line))]


def audit(
    what: str, asked: str, layers: Sequence[Layer], products: Sequence[str], max_wider_share: float
) -> dict[str, Any]:
    """Evidence that an engine multiplies in the precision `asked`.

    `products` are the graph's nodes that multiply matrices; each must be in a layer that we know to multiply, so that
    nothing passes unseen. Raises GateFailed where one is not, or where more than `max_wider_share` of the layers
    multiply in another type.
    """
    multiplying = [layer for layer in layers if layer.is_product]
    seen = {node for layer in multiplying for node in layer.nodes}
    missing = [node for node in products if node not in seen]
    if missing or not multiplying:
        raise GateFailed(
            f"{what}: {len(missing)} of the graph's {len(products)} products are in no layer that is read as one, such "
            f"as {', '.join(missing[:3])}; kinds of layers: {', '.join(sorted({layer.kind for layer in layers}))}",
            "every product's layer, to know its type",
        )
    unread = [layer for layer in multiplying if not (layer.inputs or layer.constants)]
    if unread:
        raise GateFailed(
            f"{what}: the tensors of {len(unread)} matrix layers are not read, such as those of {unread[0].name}",
            "every product's tensors, to know its type",
        )
    other = [layer for layer in multiplying if not layer.types <= _allowed(asked, layer)]
    share = len(other) / len(multiplying)
    if share > max_wider_share:
        raise GateFailed(
            f"{what}: asked {asked}, {share:.0%} of matrix layers run {_listed(other)}, such as {other[0].name}",
            f"at most {max_wider_share:.0%} in another type",
            f"export the graph in {asked} throughout, or raise tensorrt.max_wider_share",
        )
    return {
        "layers": len(layers),
        "matrix_layers": len(multiplying),
        "types": dict(Counter("+".join(sorted(layer.types)) for layer in multiplying)),
        "wider_share": share,
    }


def _allowed(asked: str, layer: Layer) -> set[str]:
    return (_WEIGHT_TYPES if layer.weights else _ACTIVATION_TYPES)[asked]


def _listed(layers: Sequence[Layer]) -> str:
    return ", ".join(sorted({type for layer in layers for type in layer.types}))


def _layer(found: re.Match[str]) -> Layer:
    nodes = re.findall(r"\[ONNX Layer: ([^\]]+)\]", found["rest"])
    return Layer(
        name=found["name"],
        kind=found["kind"],
        inputs=tuple(_operands(found["inputs"])),
        constants=tuple(_operands(found["constants"] or "")),
        nodes=tuple(nodes),
    )


def _operands(text: str) -> Iterator[Operand]:
    for one in _TENSOR.finditer(text):
        words = re.findall(r"[a-z0-9]+", one["type"].lower())  # "Half", or "Row major linear FP16 format"
        known = [_TYPES[word] for word in words if word in _TYPES]
        dims = tuple(int(axis) for axis in one["dims"].split(",") if axis)
        is_cache = bool(_CACHE.fullmatch(one["name"]))
        yield Operand(dims, known[0] if known else "+".join(words), is_cache)

"""Looks at files from elsewhere before anything opens them: what a graph or a folder may make a loader do.
Whether a file holds the right model is the parity gate's business.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper

from trainer.errors import UserError

# Elements of one constant shape that a graph may fill or repeat: 4 GiB of fp32, above any mask or position table.
_MAX_FILLED_ELEMENTS = 2**30
# A declared axis; the largest of a real model is its vocabulary or its length.
_MAX_AXIS = 2**31
_FILLING = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.npy", "*.npz", "*.joblib")
_BITS_BY_SIZE = {
    2: ("UINT2", "INT2"),
    4: ("UINT4", "INT4", "FLOAT4E2M1"),
    8: ("UINT8", "INT8", "BOOL", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"),
    16: ("UINT16", "INT16", "FLOAT16", "BFLOAT16"),
    32: ("UINT32", "INT32", "FLOAT"),
    64: ("UINT64", "INT64", "DOUBLE"),
}
# Elements of text and of other kinds have no place in a language model's graph, and no size to hold them to.
_BITS = {getattr(onnx.TensorProto, name): bits for bits, names in _BITS_BY_SIZE.items() for name in names
         if hasattr(onnx.TensorProto, name)}  # fmt: skip


def check_folder(folder: Path) -> None:
    """UserError for a folder that holds a symlink, something that is no plain file, or a format that runs code."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise UserError(f"{path} is a symlink to {path.readlink()}", "plain files", "copy the file itself there")
        if not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is no plain file", "plain files", "take it away")
        if any(path.match(pattern) for pattern in _PICKLES):
            raise UserError(
                f"{path} can hold a pickle, which runs code when it is opened", "ONNX and JSON files", "take it away"
            )


def check_graph(path: Path) -> None:
    """UserError for a graph file that would read outside its folder, or that claims sizes it does not have.

    A shape that the graph computes as it runs is not known here, and not held to a limit.
    """
    model = _read(path)
    if model.functions:
        names = ", ".join(function.name for function in model.functions)
        raise UserError(f"{path} has functions of its own: {names}", "standard operators", "export it again")
    for tensor in _tensors(model.graph):
        _check_tensor(path, tensor)
    for value in (*model.graph.input, *model.graph.output):
        axes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        if any(not 0 <= axis < _MAX_AXIS for axis in axes):
            raise UserError(f"{path}: {value.name} has shape {axes}", f"axes below {_MAX_AXIS}", "export it again")
    _check_filled(path, list(_graphs(model.graph)))


def data_files(path: Path) -> list[Path]:
    """Files beside a graph that hold its external data."""
    names = {location for tensor in _tensors(_read(path).graph) if (location := _external(tensor).get("location"))}
    return [path.parent / name for name in sorted(names)]


def _read(path: Path) -> onnx.ModelProto:
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path} is no plain file", "an ONNX file", "export it again")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is of another module in each of its implementations
        raise UserError(f"{path} cannot be read as ONNX: {error}", "a whole ONNX file", "export it again") from None
    if not model.graph.node:
        raise UserError(f"{path} holds no graph", "a whole ONNX file", "export it again")
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all graphs within its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graphs(inner)


def _tensors(whole: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All constants of a graph and of the graphs within its nodes."""
    for graph in _graphs(whole):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                yield from (*((attribute.t,) if attribute.HasField("t") else ()), *attribute.tensors)


def _external(tensor: onnx.TensorProto) -> dict[str, str]:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return {}
    return {entry.key: entry.value for entry in tensor.external_data}


def _check_tensor(path: Path, tensor: onnx.TensorProto) -> None:
    needed = _size_bytes(path, tensor)
    external = _external(tensor)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(path, tensor.name, external, needed)
        return
    held = len(tensor.raw_data) if tensor.HasField("raw_data") else _typed_bytes(tensor)
    if held < needed or (held > needed and tensor.HasField("raw_data")):
        raise UserError(
            f"{path}: {tensor.name} of shape {list(tensor.dims)} has {held} bytes",
            f"{needed} bytes",
            "export it again",
        )


def _typed_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that the elements in a tensor's typed fields can stand for."""
    fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    return sum(len(field) for field in fields) * max(1, _BITS[tensor.data_type] // 8)


def _size_bytes(path: Path, tensor: onnx.TensorProto) -> int:
    if any(axis < 0 or axis >= _MAX_AXIS for axis in tensor.dims):
        raise UserError(f"{path}: {tensor.name} has shape {list(tensor.dims)}", f"axes from 0 to {_MAX_AXIS}")
    elements = math.prod(tensor.dims)
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        raise UserError(f"{path}: {tensor.name} is of type {tensor.data_type}", "numbers", "export it again")
    return -(-elements * bits // 8)


def _check_external(path: Path, name: str, external: dict[str, Any], needed: int) -> None:
    location = external.get("location", "")
    outside = not location or Path(location).name != location or location in (".", "..") or "\\" in location
    if outside:
        raise UserError(
            f"{path}: the data of {name} is in {location!r}", "a file in the same folder", "do not open this graph"
        )
    file = path.parent / location
    if file.is_symlink() or not file.is_file():
        raise UserError(f"{path}: {file} is no plain file", "the data file that export wrote", "export it again")
    offset, length = _whole_number(external.get("offset", 0)), _whole_number(external.get("length", needed))
    if offset < 0 or length != needed or offset + length > file.stat().st_size:
        raise UserError(
            f"{path}: {name} wants {needed} bytes, {length} at {offset} of {file.name}, which has "
            f"{file.stat().st_size}",
            "data of the tensor's size within the file",
            "export it again",
        )


def _whole_number(value: Any) -> int:
    """What a graph calls a place in a file; -1, which is none, for what is no number."""
    try:
        return int(value)
    except ValueError:
        return -1


def _check_filled(path: Path, graphs: Sequence[onnx.GraphProto]) -> None:
    """A few bytes of shape may ask for terabytes: constant shapes that are filled, expanded to or repeated."""
    constants: dict[str, list[int]] = {}
    nodes = [node for graph in graphs for node in graph.node]
    for tensor in (tensor for graph in graphs for tensor in graph.initializer):
        constants |= {tensor.name: _integers(tensor)}
    for node in nodes:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            held = _integers(attribute.t) if attribute.name == "value" else [*attribute.ints] or [attribute.i]
            constants |= {node.output[0]: held}
    for node in nodes:
        place = _FILLING.get(node.op_type)
        shape = constants.get(node.input[place], []) if place is not None and len(node.input) > place else []
        if math.prod(max(1, axis) for axis in shape) > _MAX_FILLED_ELEMENTS:
            raise UserError(f"{path}: {node.op_type} {node.name} makes a tensor of shape {shape}", "a smaller one")


def _integers(tensor: onnx.TensorProto) -> list[int]:
    """The numbers of a tensor that can be a shape; none of any other."""
    if tensor.data_type != onnx.TensorProto.INT64 or _external(tensor):
        return []
    return onnx.numpy_helper.to_array(tensor).reshape(-1).tolist()

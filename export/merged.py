"""An encoder-decoder as transformers.js looks for it: an encoder that puts out hidden states alone, and one decoder for
the first step and all later ones, which makes the keys and values of what was encoded itself.

The nodes are those of the two graphs that were verified; some move from one file to the other. At the first step
(`use_cache_branch` false) an If node computes what later steps are given as their past.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.cases import Documents, tokens
from export.files import save_graph
from export.io_spec import BATCH, ENCODED, IoSpec
from export.precision import element_types
from export.runners import Arrays, OnnxRunner, Pair, open_onnx
from trainer.errors import GateFailed, UserError
from trainer.export_config import Fp32Tolerance

MERGED_STEM = "decoder_model_merged"  # optimum's and transformers.js's name
HIDDEN = "encoder_hidden_states"
USE_CACHE = "use_cache_branch"
_MASK = "encoder_attention_mask"
_MADE = "last_hidden_state"
# At the first step nothing is kept, so that its length is another than the text's.
_KEPT = "past_encoder_sequence_length"
_STEPS, _LENGTHS = 3, (9, 1, 5)
# The nodes are the same: only ONNX Runtime's fusions, and so the order of rounding, may differ.
_NEAR = Fp32Tolerance().relative_rms or 0.0
_FAULT = "this is a fault of lmworks: export without this variant, or take another version of ONNX Runtime"


def merge(files: Sequence[Path], spec: IoSpec, encoder_file: Path, decoder_file: Path) -> None:
    """Write both graphs of a model, `files` in the order of `spec.parts`, in that layout."""
    encoder, decoder = (onnx.load(file) for file in files)
    nodes, weights = _projections(encoder.graph, spec, files[0])
    _keep_hidden_alone(encoder.graph)
    save_graph(encoder, encoder_file)
    _take_in(decoder.graph, spec, nodes)
    decoder.graph.initializer.extend(weights)
    known = {one.domain for one in decoder.opset_import}
    decoder.opset_import.extend(one for one in encoder.opset_import if one.domain not in known)
    save_graph(decoder, decoder_file)


def prove_merged(
    what: str, spec: IoSpec, verified: Pair, encoder_file: Path, decoder_file: Path, documents: Documents, threads: int
) -> None:
    """Hold the two files to the graphs that they were made of, on real text with padding, over the first step and some
    later ones. GateFailed where a number differs by more than the order of rounding."""
    assert spec.encoder is not None and spec.cross is not None and spec.cache is not None
    encoder, decoder = open_onnx(encoder_file, threads), open_onnx(decoder_file, threads)
    lengths = [min(length, spec.max_length) for length in _LENGTHS]
    text = tokens(documents, spec, sum(lengths))
    rows = [np.fromiter(islice(text, length), dtype=np.int64) for length in lengths]
    inputs = spec.encoder.pad(rows, max(lengths))
    hidden, encoded = _run(what, encoder_file, encoder, inputs), verified.encoder.run(inputs)
    _require_near(what, encoder_file, hidden, {_MADE: encoded[_MADE]})
    kept, given = spec.cross.next_past(encoded), spec.cross.empty(len(rows))
    own = spec.cache.empty(len(rows))
    ids_B1 = np.full((len(rows), 1), spec.start_id, dtype=np.int64)
    for step in range(min(_STEPS, spec.max_length)):
        expected = verified.decoder.run(spec.feeds(ids_B1, inputs["attention_mask"], kept | own))
        merged_inputs = {"input_ids": ids_B1, _MASK: inputs["attention_mask"], HIDDEN: hidden[_MADE], **own, **given}
        found = _run(what, decoder_file, decoder, merged_inputs | {USE_CACHE: np.array([step > 0])})
        crossed = {name: kept[past] for past, name in zip(spec.cross.past_names, spec.cross.present_names, strict=True)}
        _require_near(what, decoder_file, found, expected | crossed)
        own, given = spec.cache.next_past(found), spec.cross.next_past(found)
        ids_B1 = expected["logits"][:, -1:].argmax(axis=-1)


def _run(what: str, file: Path, runner: OnnxRunner, inputs: Arrays) -> Arrays:
    try:
        return runner.run(inputs)
    except Exception as error:  # ONNX Runtime's have no class in common
        said = str(error).splitlines()[0][:300]
        raise GateFailed(
            f"{what}: {file.name} does not run: {said}", "the numbers of the verified graphs", _FAULT
        ) from error


def _require_near(what: str, file: Path, found: Arrays, expected: Arrays) -> None:
    for name, value in expected.items():
        error = float(np.sqrt(np.mean(np.square(found[name] - value, dtype=np.float64))))
        if not error <= _NEAR * float(np.sqrt(np.mean(np.square(value, dtype=np.float64)))):
            raise GateFailed(
                f"{what}: {name} of {file.name} is off by {error:.3g} (root mean square)",
                "the numbers of the verified graphs",
                _FAULT,
            )


def _projections(
    graph: onnx.GraphProto, spec: IoSpec, file: Path
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """What an encoder's graph, that of `file`, makes keys and values of its hidden states with, to be read from HIDDEN
    and the mask, and the weights of it; all under names of their own."""
    assert spec.cross is not None
    makers = {output: node for node in graph.node for output in node.output}
    source = makers[_MADE]
    inner = source.input[0] if source.op_type == "Cast" else _MADE  # in 16 bits, the projections read it before
    taken, values = set(), list(spec.cross.present_names)
    while values:
        name = values.pop()
        if name in makers and name not in (_MADE, inner) and makers[name].name not in taken:
            taken.add(makers[name].name)
            values += [one for one in makers[name].input if one]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node if node.name in taken]
    tokens_in = {value.name for value in graph.input}
    wrong = [node.name for node in nodes if node.op_type != "Shape" and tokens_in.intersection(node.input)]
    if wrong:
        raise UserError(
            f"{wrong[0]} of the encoder makes keys and values of more than hidden states",
            "an encoder-decoder that cannot be merged has no folder for transformers.js",
            "pack another model",
        )
    read = {name for node in nodes for name in node.input}
    weights = [onnx.TensorProto.FromString(one.SerializeToString()) for one in graph.initializer if one.name in read]
    own = [inner, *(one.name for one in weights), *(output for node in nodes for output in node.output)]
    instead = {name: _own(name) for name in own} | dict.fromkeys(tokens_in, _MASK) | {_MADE: HIDDEN}
    for node in nodes:
        node.name = _own(node.name)
        node.input[:] = [instead.get(name, name) for name in node.input]
        node.output[:] = [instead[name] for name in node.output]
    for one in weights:
        one.name = _own(one.name)
    if inner != _MADE and inner in read:
        name, type = _own(f"cast_to_{inner}"), element_types(file)[inner]
        nodes.insert(0, helper.make_node("Cast", [HIDDEN], [_own(inner)], name=name, to=type))
    return nodes, weights


def _own(name: str) -> str:
    return f"encoded/{name}"


def _keep_hidden_alone(graph: onnx.GraphProto) -> None:
    """Leave an encoder's graph what its hidden states need."""
    outputs = [value for value in graph.output if value.name == _MADE]
    needed, nodes = {_MADE}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    weights = [one for one in graph.initializer if one.name in needed]
    for field, kept in (("output", outputs), ("node", nodes[::-1]), ("initializer", weights), ("value_info", [])):
        graph.ClearField(field)
        getattr(graph, field).extend(kept)


def _take_in(graph: onnx.GraphProto, spec: IoSpec, nodes: Sequence[onnx.NodeProto]) -> None:
    """Put an If node before a decoder's own, which then read keys and values of the text from its outputs."""
    assert spec.cross is not None and spec.encoder is not None
    past, present = spec.cross.past_names, spec.cross.present_names
    keep = [helper.make_node("Identity", [old], [f"kept/{new}"], name=f"kept/{new}")
            for old, new in zip(past, present, strict=True)]  # fmt: skip
    branches: dict[str, Any] = {
        "then_branch": helper.make_graph(keep, "given", [], list(_values(spec, "kept/", _KEPT))),
        "else_branch": helper.make_graph(nodes, "encoded", [], list(_values(spec, _own(""), ENCODED))),
    }
    instead = dict(zip(past, present, strict=True))
    for node in graph.node:
        node.input[:] = [instead.get(name, name) for name in node.input]
    graph.node.insert(0, helper.make_node("If", [USE_CACHE], list(present), name="encoded", **branches))
    for value in graph.input:
        if value.name in past:
            value.type.tensor_type.shape.dim[2].dim_param = _KEPT
    width = spec.encoder.outputs[0].axes[-1]
    graph.input.append(helper.make_tensor_value_info(HIDDEN, TensorProto.FLOAT, [BATCH, ENCODED, width]))
    graph.input.append(helper.make_tensor_value_info(USE_CACHE, TensorProto.BOOL, [1]))
    _order_layers(graph)
    graph.output.extend(_values(spec, "", ENCODED))
    del graph.value_info[:]


def _order_layers(graph: onnx.GraphProto) -> None:
    """Put all of a layer's past before the next layer's: optimum gives it by its place, not by its names."""
    pasts = [value for value in graph.input if value.name.startswith("past_key_values.")]
    others = [value for value in graph.input if not value.name.startswith("past_key_values.")]
    pasts.sort(key=lambda value: int(value.name.split(".")[1]))  # of one layer, its own before the text's, as they are
    graph.ClearField("input")
    graph.input.extend([*others, *pasts])


def _values(spec: IoSpec, prefix: str, length: str) -> Iterator[onnx.ValueInfoProto]:
    assert spec.cross is not None
    for port in spec.cross.ports(spec.cross.present_names, length):
        yield helper.make_tensor_value_info(prefix + port.name, TensorProto.FLOAT, port.axes)

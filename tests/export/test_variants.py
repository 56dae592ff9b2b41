"""Forms of a graph: what is quantized, what stays in fp32 because real text overflows, and what is refused."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ml_dtypes import bfloat16
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.calibration import calibration_batches
from export.cases import make_cases
from export.dynamic import quantize
from export.io_spec import read_spec
from export.parity import check_parity
from export.precision import check_overflow, element_types, lower, measure_ranges, overflowing, runnable
from export.probe import Probe
from export.quantize import quantize_by_ranges, quantize_weights
from export.runners import CPU_PROVIDER, open_onnx, open_torch
from export.to_onnx import export_graph, load_model
from tests.export.conftest import VOCABULARY
from trainer.errors import GateFailed
from trainer.export_config import Calibration, Parity

FP16 = Parity().fp16


@pytest.fixture(scope="module")
def bert(model_folder, raw_graph, documents):
    """Spec, raw graph and calibration batches of the tiny BERT."""
    spec = read_spec(model_folder("bert"))
    return spec, raw_graph("bert"), calibration_batches(lambda needed: documents, spec, Calibration(batches=8))


def matrices(path):
    """Element types of the matrices that a graph holds."""
    held = [one for one in onnx.load(path).graph.initializer if len(one.dims) == 2]
    return {one.data_type for one in held} - {TensorProto.INT64}


def plant_overflow(raw, path):
    """The same model in fp32, but a value inside becomes a million times as large, and small again."""
    model = onnx.load(raw)
    graph = model.graph
    norm = next(node for node in graph.node if node.op_type == "LayerNormalization")
    for name, factor in (("thousand", 1e3), ("thousandth", 1e-3)):
        graph.initializer.append(numpy_helper.from_array(np.array(factor, dtype=np.float32), name))
    names = [norm.output[0], "larger", "huge", "smaller", "same"]
    chain = [
        onnx.helper.make_node("Mul", [before, factor], [after], name=f"planted_{after}")
        for before, after, factor in zip(names, names[1:], ["thousand"] * 2 + ["thousandth"] * 2, strict=False)
    ]
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "same" if name == norm.output[0] else name
    place = list(graph.node).index(norm) + 1
    for offset, node in enumerate(chain):
        graph.node.insert(place + offset, node)
    onnx.save(model, path)


@pytest.fixture(scope="module")
def gate(bert, model_folder, documents):
    """The parity gate of the tiny BERT on any file."""
    spec, _, _ = bert
    cases = make_cases(documents, spec, Parity().shapes, longest=1024)
    source = open_torch(model_folder("bert"), 1)
    expected = [source.run(case.inputs) for case in cases]

    def check(path, tolerance=FP16):
        if tolerance is FP16:
            check_overflow("m", path, cases, 1)
        return check_parity("m", spec, open_onnx(path, 1), cases, expected, tolerance)

    return check


def test_fp16_keeps_in_fp32_what_would_overflow(bert, gate, tmp_path):
    _, raw, batches = bert
    plant_overflow(raw, tmp_path / "planted.onnx")
    assert gate(tmp_path / "planted.onnx", Parity().fp32)["metrics"]["relative_rms"] < 1e-6
    lower(tmp_path / "planted.onnx", tmp_path / "all.onnx", "fp16", set())
    with pytest.raises(GateFailed, match=r"m: case 1x1: node planted_huge \(Mul\) overflows in huge"):
        gate(tmp_path / "all.onnx")
    kept = overflowing(tmp_path / "planted.onnx", measure_ranges(tmp_path / "planted.onnx", batches, 1))
    assert {"planted_huge", "planted_smaller"} <= kept
    lower(tmp_path / "planted.onnx", tmp_path / "kept.onnx", "fp16", kept)
    assert gate(tmp_path / "kept.onnx")["metrics"]["relative_rms"] < 0.005
    assert matrices(tmp_path / "kept.onnx") == {TensorProto.FLOAT16}  # a few nodes are kept, not the model


def test_an_overflow_that_calibration_never_saw_fails_the_gate(bert, gate, tmp_path):
    """Ranges of other text: the gate's own text decides."""
    _, raw, batches = bert
    plant_overflow(raw, tmp_path / "planted.onnx")
    seen = measure_ranges(tmp_path / "planted.onnx", batches, 1)
    small = {name: min(value, 1.0) for name, value in seen.items()}
    lower(tmp_path / "planted.onnx", tmp_path / "low.onnx", "fp16", overflowing(tmp_path / "planted.onnx", small))
    with pytest.raises(GateFailed, match="planted_huge"):
        gate(tmp_path / "low.onnx")


def test_ranges_are_the_largest_magnitudes_of_the_text(bert):
    _, raw, batches = bert
    logits = [open_onnx(raw, 1).run(batch)["logits"] for batch in batches]
    seen = measure_ranges(raw, batches, 1)
    assert seen["logits"] == pytest.approx(max(float(np.abs(value).max()) for value in logits), rel=1e-5)
    assert len(seen) > 50
    assert not list(raw.parent.glob(".probe*"))


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "llama"])
def test_bf16_has_bf16s_error(name, model_folder, raw_graph, tmp_path):
    """ONNX Runtime's CPU provider has none: onnx's own evaluator runs it, and the gates a graph that rounds to it."""
    spec = read_spec(model_folder(name))
    lower(raw_graph(name), tmp_path / "low.onnx", "bf16", set())
    onnx.checker.check_model(tmp_path / "low.onnx", full_check=True)
    assert matrices(tmp_path / "low.onnx") == {TensorProto.BFLOAT16}
    inputs = spec.pad([np.arange(5, 20), np.arange(30, 37)], 15)
    source = open_onnx(raw_graph(name), 1).run(inputs)["logits"]
    with runnable(tmp_path / "low.onnx", "bf16", CPU_PROVIDER) as opened:
        rounded, inner = open_onnx(opened, 1).run(inputs)["logits"], Probe(opened, 1).run(inputs)
    for actual in (ReferenceEvaluator(str(tmp_path / "low.onnx")).run(["logits"], inputs)[0], rounded):
        assert actual.dtype == np.float32
        real = inputs["attention_mask"] == 1
        error = np.sqrt(np.square(actual - source)[real].mean() / np.square(source)[real].mean())
        assert 1e-4 < error < Parity().bf16.relative_rms
    np.testing.assert_allclose(rounded, inner["logits"], atol=0.1 * np.abs(rounded - source).max())  # optimized, alike
    held = [name for name, type in element_types(tmp_path / "low.onnx").items() if type == TensorProto.BFLOAT16]
    values = [inner[name] for name in held if name in inner]
    assert len(values) > 50 and all((value == value.astype(bfloat16).astype(np.float32)).all() for value in values)


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("form", ["fp32", "fp16", "bf16", "int8"])
def test_a_text_of_nothing_but_padding_harms_no_other(name, form, model_folder, raw_graph, documents, tmp_path):
    """Its tokens attend to nobody, as padding on the left of a decoder's text does; all numbers stay finite."""
    spec, raw, path = read_spec(model_folder(name)), raw_graph(name), tmp_path / "form.onnx"
    if form == "int8":
        quantize(raw, path, fused=name == "llama")
    elif form == "fp32":
        path = raw
    else:
        batches = calibration_batches(lambda needed: documents, spec, Calibration(batches=4))
        kept = overflowing(raw, measure_ranges(raw, batches, 1)) if form == "fp16" else set()
        lower(raw, path, form, kept)
    ids = np.arange(5, 20)
    inputs = spec.pad([ids, ids, ids], 15)
    inputs["attention_mask"][1], inputs["attention_mask"][2, :6] = 0, 0
    if form in ("fp16", "bf16"):  # ONNX Runtime's CPU provider computes in fp32, or not at all
        made = ReferenceEvaluator(str(path)).run(["logits"], inputs)[0]
    else:
        made = open_onnx(path, 1).run(inputs)["logits"]
    source = open_torch(model_folder(name), 1).run(inputs)["logits"]
    assert np.isfinite(made).all()
    real = inputs["attention_mask"] == 1
    error = np.sqrt(np.square(made - source)[real].mean() / np.square(source)[real].mean())
    assert error < getattr(Parity(), form).relative_rms


@pytest.mark.parametrize("form", ["fp16", "bf16"])
def test_tokens_far_on_are_turned_in_fp32(form, model_folder, raw_graph, tmp_path):
    """In bf16 no odd number above 256 is left, and in fp16 angles above 1024 are whole: positions would be others."""
    raw, path = raw_graph("llama"), tmp_path / "low.onnx"
    names = lower(raw, path, form, set())  # no text, as none of it is padding
    left = Counter(node.op_type for node in onnx.load(raw).graph.node if node.name in names)
    assert left == {"Cast": 1, "Concat": 1, "Sin": 1, "Cos": 1, "Mul": 1} | dict.fromkeys(
        ("Pow", "ReduceMean", "Add", "Sqrt", "Div"), 5
    )
    inputs = read_spec(model_folder("llama")).pad([np.arange(5, 20)], 15)
    far = inputs | {"position_ids": inputs["position_ids"] + 5001}
    source = open_onnx(raw, 1).run(far)["logits"]
    assert np.abs(source - open_onnx(raw, 1).run(inputs)["logits"]).max() < 1e-3  # only distances count
    made = ReferenceEvaluator(str(path)).run(["logits"], far)[0]
    assert np.sqrt(np.square(made - source).mean() / np.square(source).mean()) < getattr(Parity(), form).relative_rms


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_norms_epsilon_is_that_of_the_model_in_fp16(name, model_folder, tmp_path):
    """ONNX Runtime takes a norm's nodes together; small values, as trained tables of embeddings hold, show it."""
    spec = read_spec(model_folder(name)).parts[0]
    model = load_model(model_folder(name), spec)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.03)
    raw, path = tmp_path / "raw.onnx", tmp_path / "low.onnx"
    export_graph(model, spec, raw, 20)
    lower(raw, path, "fp16", set())
    loaded, options = tmp_path / "loaded.onnx", onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(loaded)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    norms = [node for node in onnx.load(loaded).graph.node if "SimplifiedLayerNormalization" in node.op_type]
    epsilons = {one.f for node in norms for one in node.attribute if one.name == "epsilon"}
    assert norms and epsilons == {np.float32(1e-6)}
    inputs = spec.pad([np.arange(5, 20)], 15)
    output = spec.outputs[0].name
    made, source = open_onnx(path, 1).run(inputs)[output], open_onnx(raw, 1).run(inputs)[output]
    assert np.sqrt(np.square(made - source).mean() / np.square(source).mean()) < Parity().fp16.relative_rms / 2


def quantization_scales(path):
    """The scales of quantized activations."""
    graph = onnx.load(path).graph
    values = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    return {node.input[0]: float(values[node.input[1]]) for node in graph.node if node.op_type == "QuantizeLinear"}


def test_calibrations_differ_as_their_names_say(bert, gate, tmp_path):
    _, raw, batches = bert
    scales = {}
    for method in ("minmax", "percentile", "entropy"):
        path = tmp_path / f"{method}.onnx"
        quantize_by_ranges(raw, path, batches, Calibration(method=method, percentile=99.0))
        scales[method] = quantization_scales(path)
    loose = Parity().int8_static.model_copy(update={"relative_rms": 0.3, "min_top1": 0.0})
    assert gate(tmp_path / "minmax.onnx", loose)["metrics"]["relative_rms"] > 1e-3
    names = scales["minmax"]
    assert len(names) >= 8
    assert all(scales["percentile"][name] < scales["minmax"][name] for name in names)
    assert all(scales["entropy"][name] <= scales["minmax"][name] * 1.01 for name in names)
    assert scales["entropy"] != scales["minmax"]


def test_symmetric_ranges_have_no_zero_points(bert, gate, tmp_path):
    """What TensorRT takes: its zero points are 0, and its values signed."""
    _, raw, batches = bert
    quantize_by_ranges(raw, tmp_path / "s.onnx", batches, Calibration(symmetric=True))
    graph = onnx.load(tmp_path / "s.onnx").graph
    values = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    points = [values[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(points) >= 8 and all(point.dtype == np.int8 and not point.any() for point in points)
    loose = Parity().int8_static.model_copy(update={"relative_rms": 0.3, "min_top1": 0.0})
    assert gate(tmp_path / "s.onnx", loose)["metrics"]["relative_rms"] > 1e-3


def test_calibration_halves_its_lengths(bert, documents):
    _, _, batches = bert
    assert [batch["input_ids"].shape for batch in batches] == [(2, 64 >> step) for step in range(7)] + [(2, 64)]
    assert [batch["attention_mask"].sum(axis=1).tolist() for batch in batches[:2]] == [[64, 32], [32, 16]]
    stream = np.concatenate(documents)
    assert batches[0]["input_ids"][0].tolist() == stream[:64].tolist()


def test_calibration_sees_what_masks_hold(bert):
    """Without padding they would hold zeros, and the largest number of fp32 would be taken for one that fits."""
    _, raw, batches = bert
    unpadded = [{name: value[:1] for name, value in batch.items()} for batch in batches]
    assert max(measure_ranges(raw, batches, 1).values()) > 1e38 > max(measure_ranges(raw, unpadded, 1).values())


def test_int4_holds_every_matrix_in_blocks_and_tables_in_int8(raw_graph, tmp_path):
    quantize_weights(raw_graph("llama"), tmp_path / "q4.onnx")
    graph = onnx.load(tmp_path / "q4.onnx").graph
    constants = {one.name for one in graph.initializer}
    blocks = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(blocks) == 2 * 7 + 1  # and the head, which is untied
    assert not [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    held = {one.name: one for one in graph.initializer}
    table, scales = (held[f"model.model.embed_tokens.weight_table_{part}"] for part in ("quantized", "scale"))
    assert table.data_type == TensorProto.INT8 and scales.dims == [VOCABULARY, 1]
    assert "model.model.embed_tokens.weight" not in held

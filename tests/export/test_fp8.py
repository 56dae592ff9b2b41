"""The fp8 form: what is rounded and to what, how far it may be off, and faults that the gates and the audit catch."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from export import export as stage
from export.audit import audit, read_layers
from export.cache import cache_cases
from export.calibration import calibration_batches
from export.cases import make_cases
from export.fp8 import check_rounded, round_products
from export.io_spec import read_spec
from export.pack import choose_variant
from export.parity import check_parity
from export.runners import open_onnx, open_torch
from export.to_tensorrt import Builder, build_engines, capabilities_for, products
from export.verified import examine
from tests.export.conftest import GATES
from tests.export.test_tensorrt import SETTINGS as ENGINE
from trainer.artifact import read_artifact
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError
from trainer.export_config import Calibration, Export, Parity
from trainer.serving_config import Pack

E4M3 = TensorProto.FLOAT8E4M3FN
# Random weights make near-ties of all logits, so that fp8 is judged here by its error alone.
LOOSE = Parity().fp8.model_copy(update={"min_top1": 0.0})
FEED_FORWARD = ("node_MatMul_113", "node_MatMul_115")  # of the first layer of the tiny BERT


@pytest.fixture(scope="module")
def rounded(model_folder, raw_graph, documents, tmp_path_factory):
    """Gives the fp8 file of a tiny model by name, made once; not to be changed."""
    root = tmp_path_factory.mktemp("fp8")

    def give(name):
        path = root / name / "model_fp8.onnx"
        if not path.exists():
            path.parent.mkdir()
            spec = read_spec(model_folder(name))
            batches = calibration_batches(lambda needed: documents, spec, Calibration(batches=8))
            round_products(raw_graph(name), path, batches, 1)
        return path

    return give


@pytest.fixture(scope="module")
def gate(model_folder, documents):
    """The parity gate of a tiny model on any file."""

    def check(name, path):
        spec = read_spec(model_folder(name))
        source = open_torch(model_folder(name), 1)
        cases = make_cases(documents, spec, Parity().shapes, longest=1024)
        cases += cache_cases(documents, spec, source, longest=1024) if spec.cache else []
        expected = [source.run(case.inputs) for case in cases]
        return check_parity(name, spec, open_onnx(path, 1), cases, expected, LOOSE)

    return check


@pytest.fixture(scope="module")
def builder():
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install '.[rtx]'")
    return Builder("tensorrt_rtx")


def tensors(graph):
    return {one.name: one for one in graph.initializer}


def edited(source, folder, edit):
    """A copy of an fp8 file with a fault."""
    model = onnx.load(source)
    edit(model.graph)
    onnx.save(model, folder / source.name)
    return folder / source.name


def leave_out(graph, names=FEED_FORWARD):
    """These products read what was not rounded."""
    held = tensors(graph)
    for node in [node for node in graph.node if node.name in names]:
        activation, weight = (name.removesuffix("_rounded") for name in node.input)
        stored, scale = (numpy_helper.to_array(held[f"{weight}_fp8{of}"]) for of in ("", "_scale"))
        graph.initializer.append(numpy_helper.from_array(stored.astype(np.float32) * scale, weight))
        node.input[:] = [activation, weight]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_every_product_is_between_fp8_numbers_and_the_gate_holds(name, rounded, raw_graph, gate):
    path = rounded(name)
    onnx.checker.check_model(path, full_check=True)
    check_rounded(name, path)
    metrics = gate(name, path)["metrics"]
    assert 0.01 < metrics["relative_rms"] < LOOSE.relative_rms  # rounded, indeed
    before, after = (onnx.load(one).graph for one in (raw_graph(name), path))
    multiplied = {node.input[1] for node in before.node if node.op_type == "MatMul"} & set(tensors(before))
    stored = {one.name.removesuffix("_fp8"): one for one in after.initializer if one.data_type == E4M3 and one.dims}
    assert len(multiplied) >= 8 and multiplied <= set(stored) and not multiplied & set(tensors(after))
    for weight in multiplied:
        scale = numpy_helper.to_array(tensors(after)[f"{weight}_fp8_scale"])
        back = numpy_helper.to_array(stored[weight]).astype(np.float32) * scale
        value = numpy_helper.to_array(tensors(before)[weight])
        # Half of the last of 3 bits, or of the smallest number that there is.
        assert (np.abs(back - value) <= np.maximum(np.abs(value) / 16, scale * 2.0**-10) * 1.001).all()
        assert np.abs(back).max() == pytest.approx(np.abs(value).max())


def test_attention_is_rounded_too(rounded):
    graph = onnx.load(rounded("bert")).graph
    values = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    attention = [node for node in graph.node if node.op_type == "MatMul" and "Softmax" in makers(graph, node.input[0])]
    assert len(attention) == 2 and all(values.issuperset(node.input) for node in attention)


def makers(graph, name):
    """Operators right before a rounded value."""
    by_output = {output: node for node in graph.node for output in node.output}
    kinds = set()
    for _ in range(5):
        if name not in by_output:
            break
        kinds.add(by_output[name].op_type)
        name = by_output[name].input[0]
    return kinds


@pytest.mark.parametrize("what", ["layer_norm", "val_112", "val_98"], ids=["activation", "weight", "probabilities"])
def test_a_scale_ten_times_too_small_fails_the_gate(what, rounded, gate, tmp_path):
    """Most of its numbers are cut off at the largest that there is (weights: read at a tenth)."""

    def shrink(graph):
        scale = tensors(graph)[f"{what}_fp8_scale"]
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / np.float32(10), scale.name))

    with pytest.raises(GateFailed, match="bert: case .*: relative_rms"):
        gate("bert", edited(rounded("bert"), tmp_path, shrink))


def test_a_block_that_was_left_out_fails_the_gate(rounded, gate, tmp_path):
    """Though it is nearer to its source than it should be: no comparison of numbers tells."""
    path = edited(rounded("bert"), tmp_path, leave_out)
    gate("bert", path)
    with pytest.raises(GateFailed, match=r"bert: 2 of 18 products read numbers .* such as \['node_MatMul_113'\]"):
        check_rounded("bert", path)


@pytest.mark.parametrize("capability", ["8.9", "12.0"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_an_engine_multiplies_in_fp8(name, capability, builder, rounded, model_folder):
    """Attention's products too, and GPT-2's queries, keys and values, which are one product that is split."""
    graph = rounded(name)
    _, description = builder.build(graph, read_spec(model_folder(name)), ENGINE, capability)
    found = audit(name, "fp8", read_layers(description), products(graph), 0.0)
    assert found["types"] == {"fp8": found["matrix_layers"]} and found["matrix_layers"] >= 2 * 2 * 4


def test_a_block_that_was_left_out_fails_the_audit(builder, rounded, model_folder, tmp_path):
    graph = edited(rounded("bert"), tmp_path, leave_out)
    _, description = builder.build(graph, read_spec(model_folder("bert")), ENGINE, "8.9")
    with pytest.raises(GateFailed, match="bert: asked fp8, 14% of matrix layers run fp32, such as"):
        audit("bert", "fp8", read_layers(description), products(graph), 0.0)


def test_a_weight_that_is_widened_before_its_product_fails_the_audit():
    """Its layer has no weight then, and is no product of two activations either: seen with scales by channel."""
    line = (
        "Name: __myl_CastMulFc_myl1_3, LayerType: runtime_fusion, Inputs: [ { Name: x, Dimensions: [1,-1,32], "
        "Datatype: FP8, Format: x }, { Name: w, Dimensions: [1,32,96], Datatype: Float, Format: x }], Outputs: "
        "[ { Name: y, Dimensions: [1,-1,96], Datatype: Float }], TacticName: , StreamId: 0, Metadata: "
        "[ONNX Layer: node_MatMul_53]"
    )
    with pytest.raises(GateFailed, match="m: asked fp8, 100% of matrix layers run fp32, fp8"):
        audit("m", "fp8", read_layers(line), ["node_MatMul_53"], 0.0)


def test_older_gpus_multiply_no_fp8(builder, capsys):
    """Left out and said where the list is ours, refused where it is the recipe's."""
    assert capabilities_for("fp8", ENGINE, builder) == ("8.9", "12.0")
    assert "fp8: no engine for 8.0: older GPUs multiply no fp8" in capsys.readouterr().out
    assert capabilities_for("fp32", ENGINE, builder) == ("8.0", "8.9", "12.0")
    named = ENGINE.model_copy(update={"compute_capabilities": ("8.0", "8.9")})
    with pytest.raises(UserError, match=r"fp8 for compute capability 8.0\nNeeded: 8.9 or more: older GPUs multiply no"):
        capabilities_for("fp8", named, builder)


def test_the_stages_make_it_where_it_is_named(model_folder, documents, builder, tmp_path, capsys):
    parity = GATES["parity"] | {"fp8": LOOSE.model_dump()}
    section = GATES | {"parity": parity, "variants": ["fp32", "fp8"], "models": {"bert": str(model_folder("bert"))}}
    engine = ENGINE.model_dump() | {"variants": ["fp8"]}
    recipe = Recipe.model_validate({"run_dir": tmp_path, "export": section, "tensorrt": engine})
    stage.export_model(recipe, recipe.export, "bert", model_folder("bert"), documents)
    record = read_artifact(tmp_path / "export" / "bert", "onnx")
    (proof,) = [entry for entry in record["evidence"] if entry["what"] == "parity_fp8"]
    assert proof["file"] == "model_fp8.onnx" and proof["calibration"]["batches"] == 16
    subject = examine("bert", tmp_path / "export" / "bert", model_folder("bert"))
    assert choose_variant(subject, "auto", "cpu").variant == "fp32"  # though fp8's file is smaller
    with pytest.raises(ValueError, match="variant fp8 is for engines alone: set backend: tensorrt"):
        Pack(variant="fp8")
    build_engines(recipe, recipe.tensorrt, builder, subject)
    assert "bert fp8 for 12.0" in capsys.readouterr().out
    built = read_artifact(tmp_path / "tensorrt" / "bert", "engines")["evidence"]
    assert [entry["what"] for entry in built] == ["audit_fp8_8.9", "audit_fp8_12.0"]


def test_it_needs_an_operator_set_that_has_it(model_folder, tmp_path):
    section = {"models": {"m": str(model_folder("bert"))}, "variants": ["fp8"], "opset": 18}
    recipe = Recipe.model_validate({"run_dir": tmp_path, "export": section})
    with pytest.raises(UserError, match=r"names fp8, and export.opset is 18\nNeeded: 19 or more"):
        stage.run(recipe)
    assert Export().opset >= 19

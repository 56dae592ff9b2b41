"""The parity gate: an honest graph passes, and every planted fault is caught with the place where it shows."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.cases import make_cases
from export.io_spec import read_spec
from export.parity import check_parity
from export.quantize import quantize
from export.runners import open_onnx
from export.to_onnx import Traceable, export_graph, load_model
from trainer.errors import GateFailed
from trainer.export_config import Parity

FP32, INT8 = Parity().fp32, Parity().int8


class Bench:
    """One exported model, its cases and its source's outputs; `check` runs the gate on an edited copy of the graph."""

    def __init__(self, folder, documents, root):
        self.root = root
        self.spec = read_spec(folder)
        self.cases = make_cases(documents, self.spec, Parity().shapes, longest=1024)
        self.folder = folder
        self.expected = self.outputs(lambda model: None)
        self.path = root / "model.onnx"
        export_graph(load_model(folder, self.spec), self.spec, self.path, 20)

    def outputs(self, fault):
        """What the source gives for each case after `fault` was planted in its weights."""
        model = load_model(self.folder, self.spec)
        with torch.no_grad():
            fault(model)
            return [
                {"logits": Traceable(model, self.spec)(*map(torch.from_numpy, case.inputs.values())).numpy()}
                for case in self.cases
            ]

    def check_against(self, fault):
        """The gate between the graph and a source that differs from it by `fault`."""
        return check_parity("m fp32", self.spec, open_onnx(self.path, 1), self.cases, self.outputs(fault), FP32)

    def check(self, edit=None, tolerance=FP32, path=None):
        graph = onnx.load(path or self.path)
        if edit is not None:
            edit(graph.graph)
        edited = self.root / "edited.onnx"
        onnx.save(graph, edited)
        return check_parity("m fp32", self.spec, open_onnx(edited, 1), self.cases, self.expected, tolerance)


@pytest.fixture(scope="module")
def bert(model_folder, documents, tmp_path_factory):
    return Bench(model_folder("bert"), documents, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def gpt2(model_folder, documents, tmp_path_factory):
    return Bench(model_folder("gpt2"), documents, tmp_path_factory.mktemp("gpt2"))


def change(graph, name, function):
    """Replace the initializers whose names end in `name`; there must be one at least."""
    found = [initializer for initializer in graph.initializer if initializer.name.endswith(name)]
    assert found, [initializer.name for initializer in graph.initializer]
    for initializer in found:
        value = function(numpy_helper.to_array(initializer).copy())
        initializer.CopyFrom(numpy_helper.from_array(value.astype(np.float32), initializer.name))


def one_weight(model):
    weight = model.bert.encoder.layer[1].attention.self.query.weight
    index = np.unravel_index(int(weight.abs().argmax()), weight.shape)
    weight[index] *= 1.01


def one_layers_weights(model):
    model.bert.encoder.layer[0].intermediate.dense.weight.mul_(1.01)


def swap_layers(model):
    layers = model.bert.encoder.layer if hasattr(model, "bert") else model.transformer.h
    first, second = copy.deepcopy(layers[0].state_dict()), copy.deepcopy(layers[1].state_dict())
    layers[0].load_state_dict(second)
    layers[1].load_state_dict(first)


def other_head(model):
    model.cls.predictions.decoder.bias[3] *= 1.01


def ignore_mask(graph):
    """Every reader of attention_mask reads ones of the same shape instead."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[index] = "all_ones"
    one = numpy_helper.from_array(np.array([1], dtype=np.int64))
    graph.node.insert(0, onnx.helper.make_node("Shape", ["attention_mask"], ["its_shape"]))
    graph.node.insert(1, onnx.helper.make_node("ConstantOfShape", ["its_shape"], ["all_ones"], value=one))


def freeze_batch(graph):
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def add_output(graph):
    graph.output.append(onnx.helper.make_tensor_value_info("hidden", onnx.TensorProto.FLOAT, None))
    graph.node.append(onnx.helper.make_node("Identity", [graph.output[0].name], ["hidden"]))


def drop_input(graph):
    name = "token_type_ids"
    graph.input.remove(next(value for value in graph.input if value.name == name))
    shape = [onnx.helper.make_node("Shape", ["input_ids"], ["ids_shape"])]
    zero = numpy_helper.from_array(np.array([0], dtype=np.int64))
    for index, node in enumerate([*shape, onnx.helper.make_node("ConstantOfShape", ["ids_shape"], [name], value=zero)]):
        graph.node.insert(index, node)


def keep_traced_length(graph):
    """The signature stays dynamic, but outputs end at the traced length."""
    for name, value in (("from", 0), ("to", 24), ("axis", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array([value], dtype=np.int64), name))
    last = graph.node[-1]
    graph.node.append(onnx.helper.make_node("Slice", ["whole", "from", "to", "axis"], [last.output[0]]))
    last.output[0] = "whole"


def add_traced_table(graph):
    """The signature stays dynamic, but a table of the traced length is added inside: longer inputs cannot run."""
    graph.initializer.append(numpy_helper.from_array(np.zeros((1, 24, 1), dtype=np.float32), "traced"))
    for name, value in (("from", 0), ("one", 1), ("two", 2)):
        graph.initializer.append(numpy_helper.from_array(np.array([value], dtype=np.int64), name))
    last = graph.node[-1]
    for kind, inputs, output in (
        ("Shape", ["input_ids"], "sizes"),
        ("Slice", ["sizes", "one", "two", "from"], "length"),
        ("Slice", ["traced", "from", "length", "one"], "rows"),
        ("Add", ["inner", "rows"], last.output[0]),
    ):
        graph.node.append(onnx.helper.make_node(kind, inputs, [output]))
    last.output[0] = "inner"


def test_honest_graphs_pass(bert, gpt2):
    for bench in (bert, gpt2):
        evidence = bench.check()
        assert evidence["metrics"]["relative_rms"] < 1e-6
        assert evidence["metrics"]["top1"] == 1.0
        assert evidence["metrics"]["positions"] == sum(int(case.mask_BT.sum()) for case in bench.cases)


def test_cases_are_real_padded_and_not_the_traced_shape(bert):
    shapes = [case.inputs["input_ids"].shape for case in bert.cases]
    assert (2, 24) not in shapes
    assert {(1, 1), (1, bert.spec.max_length)} <= set(shapes)
    lengths = [set(case.mask_BT.sum(axis=1).tolist()) for case in bert.cases]
    assert any(len(unequal) > 2 for unequal in lengths)


WHERE = r"m fp32: case \d+x\d+, output logits: .* at position \(\d+, \d+, \d+\)"


@pytest.mark.parametrize("fault", [one_weight, one_layers_weights, swap_layers, other_head])
def test_a_graph_of_other_weights_is_caught(bert, fault):
    with pytest.raises(GateFailed, match=WHERE):
        bert.check_against(fault)


@pytest.mark.parametrize(
    "edit",
    [
        lambda g: change(g, "position_embeddings.weight", lambda v: np.roll(v, 1, axis=0)),
        lambda g: change(g, "layer.1.output.LayerNorm.weight", lambda v: v * 1.01),
        ignore_mask,
    ],
    ids=["positions off by one", "norm scaled", "mask ignored"],
)
def test_a_wrong_graph_is_caught(bert, edit):
    with pytest.raises(GateFailed, match=WHERE):
        bert.check(edit)


def test_faults_in_causal_models_are_caught(gpt2):
    gpt2.check(ignore_mask)  # padding on the right is out of a causal model's sight: this is no fault
    with pytest.raises(GateFailed, match=WHERE):
        gpt2.check(lambda g: change(g, "wpe.weight", lambda v: np.roll(v, 1, axis=0)))
    with pytest.raises(GateFailed, match=WHERE):
        gpt2.check_against(swap_layers)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (freeze_batch, r"inputs are input_ids: int64\[2, sequence_length\] \(not as declared\)"),
        (add_output, r"outputs are .*hidden.* \(not as declared\)"),
        (drop_input, r"exactly .*token_type_ids"),
        (keep_traced_length, r"case 3x33, output logits: shape \(3, 24, 300\)"),
        (add_traced_table, r"case 3x33 does not run: "),
    ],
)
def test_wrong_signatures_are_caught(bert, edit, message):
    with pytest.raises(GateFailed, match=f"(?s){message}"):
        bert.check(edit)


def test_non_finite_outputs_fail(bert):
    def poison(value):
        value[7] = np.nan
        return value

    with pytest.raises(GateFailed, match=r"position \(0, 0, 7\): nan"):
        bert.check(lambda g: change(g, "decoder.bias", poison))


def test_int8_of_other_weights_is_caught(bert, model_folder, tmp_path):
    quantize(bert.path, tmp_path / "same.onnx")
    loose = INT8.model_copy(update={"min_top1": 0.0})  # random weights: near-ties everywhere
    assert bert.check(path=tmp_path / "same.onnx", tolerance=loose)["metrics"]["relative_rms"] > 1e-3
    other = model_folder("bert", 1)
    export_graph(load_model(other, bert.spec), bert.spec, tmp_path / "raw.onnx", 20)
    quantize(tmp_path / "raw.onnx", tmp_path / "other.onnx")
    with pytest.raises(GateFailed, match="relative_rms"):
        bert.check(path=tmp_path / "other.onnx", tolerance=loose)


def test_top1_has_a_gate_of_its_own(bert):
    """Logits that differ little but rank differently: a constant is added to one column of the vocabulary."""

    def raise_one(value):
        value[9] += 100.0
        return value

    only_top1 = INT8.model_copy(update={"relative_rms": None, "min_top1": 0.9})
    with pytest.raises(GateFailed, match=r"highest logit agrees at \d"):
        bert.check(lambda g: change(g, "decoder.bias", raise_one), tolerance=only_top1)

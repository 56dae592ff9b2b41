"""The parity gate: an honest graph passes, and every planted fault is caught with the place where it shows."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.cache import cache_cases, run_in_steps
from export.cases import make_cases
from export.dynamic import quantize
from export.io_spec import read_spec
from export.parity import check_parity
from export.runners import open_onnx, open_torch
from trainer.errors import GateFailed
from trainer.export_config import Parity

FP32, INT8 = Parity().fp32, Parity().int8


class Bench:
    """One exported model, its cases and its source's outputs; `check` runs the gate on an edited copy of the graph."""

    def __init__(self, folder, graph, documents, root):
        self.root = root
        self.spec = read_spec(folder)
        self.cases = make_cases(documents, self.spec, Parity().shapes, longest=1024)
        if self.spec.cache:
            self.cases += cache_cases(documents, self.spec, open_torch(folder, 1), longest=1024)
        self.folder = folder
        self.expected = self.outputs(lambda model: None)
        self.path = graph

    def outputs(self, fault):
        """What the source gives for each case after `fault` was planted in its weights."""
        source = open_torch(self.folder, 1)
        with torch.no_grad():
            fault(source.call.model)
        return [source.run(case.inputs) for case in self.cases]

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
def bert(model_folder, raw_graph, documents, tmp_path_factory):
    return Bench(model_folder("bert"), raw_graph("bert"), documents, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def gpt2(model_folder, raw_graph, documents, tmp_path_factory):
    return Bench(model_folder("gpt2"), raw_graph("gpt2"), documents, tmp_path_factory.mktemp("gpt2"))


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


def ignore_mask(graph, mask="attention_mask"):
    """Every reader of the mask reads ones of the same shape instead."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == mask:
                node.input[index] = "all_ones"
    one = numpy_helper.from_array(np.array([1], dtype=np.int64))
    graph.node.insert(0, onnx.helper.make_node("Shape", [mask], ["its_shape"]))
    graph.node.insert(1, onnx.helper.make_node("ConstantOfShape", ["its_shape"], ["all_ones"], value=one))


def freeze(graph, name, axis):
    value = next(value for value in (*graph.input, *graph.output) if value.name == name)
    value.type.tensor_type.shape.dim[axis].dim_value = 5


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
        assert all(tried["relative_rms"] > 0 for tried in evidence["cases"])  # another computation, not the same one
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


def test_answers_are_ranked_among_the_tokens_of_their_row(model_folder, raw_graph, documents, tmp_path):
    """A start that is moved by one token is caught by its rank alone, and padding never wins."""
    folder = model_folder("bert_answers")
    bench = Bench(folder, raw_graph("bert_answers"), documents, tmp_path)
    ranks = FP32.model_copy(update={"max_abs": None, "relative_rms": None})
    rows = sum(len(case.mask_BT) for case in bench.cases)
    assert bench.check(tolerance=ranks)["metrics"]["positions"] == 2 * rows

    def favour_the_second(graph):
        """Adds to each token's start the number of its place, which moves the highest."""
        graph.initializer.append(numpy_helper.from_array(np.arange(72, dtype=np.float32)[None], "places"))
        for name, value in (("from", 0), ("one", 1), ("two", 2)):
            graph.initializer.append(numpy_helper.from_array(np.array([value], dtype=np.int64), name))
        last = next(node for node in graph.node if "start_logits" in node.output)
        last.output[list(last.output).index("start_logits")] = "inner"
        for kind, inputs, output in (
            ("Shape", ["input_ids"], "sizes"),
            ("Slice", ["sizes", "one", "two", "from"], "length"),
            ("Slice", ["places", "from", "length", "one"], "used"),
            ("Add", ["inner", "used"], "start_logits"),
        ):
            graph.node.append(onnx.helper.make_node(kind, inputs, [output]))

    with pytest.raises(GateFailed, match=r"highest logit agrees at .*, output start_logits"):
        bench.check(favour_the_second, tolerance=ranks)


def test_wrong_weights_of_causal_models_are_caught(gpt2):
    with pytest.raises(GateFailed, match=WHERE):
        gpt2.check(lambda g: change(g, "wpe.weight", lambda v: np.roll(v, 1, axis=0)))
    with pytest.raises(GateFailed, match=WHERE):
        gpt2.check_against(swap_layers)


def rename(graph, names):
    """Exchange the names of inputs or outputs, and of nothing else: what they stand for is exchanged."""
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                field[index] = names.get(name, name)


def exchange(first, second):
    pairs = [(first.format(kind), second.format(kind)) for kind in ("key", "value")]
    return {**dict(pairs), **{b: a for a, b in pairs}}


def shift_positions(graph):
    """Each token is taken for the one after it, as when a cache's length is counted wrongly."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == "position_ids":
                node.input[index] = "later"
    graph.initializer.append(numpy_helper.from_array(np.array(1, dtype=np.int64), "step"))
    graph.node.insert(0, onnx.helper.make_node("Add", ["position_ids", "step"], ["later_raw"]))
    graph.initializer.append(numpy_helper.from_array(np.array(71, dtype=np.int64), "last"))
    graph.node.insert(1, onnx.helper.make_node("Min", ["later_raw", "last"], ["later"]))


def forget_a_token(graph):
    """The cache that is handed on lacks its newest token's key; the length is kept by doubling the one before it."""
    last = next(node for node in graph.node if "present.1.key" in node.output)
    last.output[0] = "whole_key"
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "whole_key" if name == "present.1.key" else name
    for name, value in (("first", 0), ("but_last", -1), ("end", 2**31), ("slots", 2)):
        graph.initializer.append(numpy_helper.from_array(np.array([value], dtype=np.int64), name))
    for kind, inputs, output, more in (
        ("Slice", ["whole_key", "first", "but_last", "slots"], "shorter", {}),
        ("Slice", ["whole_key", "first", "one_slot", "slots"], "filler", {}),
        ("Concat", ["shorter", "filler"], "present.1.key", {"axis": 2}),
    ):
        graph.node.append(onnx.helper.make_node(kind, inputs, [output], **more))
    graph.initializer.append(numpy_helper.from_array(np.array([1], dtype=np.int64), "one_slot"))


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (lambda g: rename(g, exchange("present.0.{}", "present.1.{}")), r"case 1x1, output present\.0\.key"),
        (
            lambda g: rename(g, exchange("past_key_values.0.{}", "past_key_values.1.{}")),
            r"case 1x1 after 1, output logits",
        ),
        (shift_positions, r"case 1x1, output logits"),
        (ignore_mask, r"case 2x3 after 7 padded left, output logits"),
        (forget_a_token, r"case 1x7, output present\.1\.key"),
    ],
    ids=["presents swapped", "pasts swapped", "positions off by one", "mask ignored", "a token forgotten"],
)
def test_faults_of_the_cache_are_caught(gpt2, edit, where):
    with pytest.raises(GateFailed, match=f"m fp32: {where}.* at position"):
        gpt2.check(edit)


def test_steps_are_taken_one_by_one_on_the_candidates_own_cache(gpt2):
    class Recording:
        def __init__(self, runner):
            self.runner, self.inputs, self.outputs = runner, [], []

        def run(self, inputs):
            self.inputs.append(inputs)
            self.outputs.append(self.runner.run(inputs))
            return self.outputs[-1]

    case = next(case for case in gpt2.cases if case.steps_after is not None)
    recording = Recording(open_onnx(gpt2.path, 1))
    outputs = run_in_steps(recording, gpt2.spec, case)
    assert [inputs["input_ids"].shape[1] for inputs in recording.inputs] == [5] + [1] * 64
    for before, after in zip(recording.outputs, recording.inputs[1:], strict=False):
        np.testing.assert_array_equal(before["present.1.value"], after["past_key_values.1.value"])
    assert outputs["logits"].shape == (3, 69, 300) and outputs["present.0.key"].shape == (3, 4, 69, 8)
    assert case.mask[:, :5].tolist() == [[True] * 5, [False] * 2 + [True] * 3, [True] * 3 + [False] * 2]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda g: freeze(g, "past_key_values.1.key", 2),
            r"inputs are .*past_key_values.1.key: float32\[batch_size, 4, 5",
        ),
        (lambda g: freeze(g, "present.0.value", 2), r"outputs are .*present.0.value: .* \(not as declared\)"),
        (add_output, r"outputs are .*hidden.* \(not as declared\)"),
    ],
)
def test_wrong_signatures_of_a_cache_are_caught(gpt2, edit, message):
    with pytest.raises(GateFailed, match=f"(?s){message}"):
        gpt2.check(edit)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda g: freeze(g, "input_ids", 0), r"inputs are input_ids: int64\[5, sequence_length\] \(not as declared\)"),
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


def test_int8_of_other_weights_is_caught(bert, raw_graph, tmp_path):
    quantize(bert.path, tmp_path / "same.onnx")
    loose = INT8.model_copy(update={"min_top1": 0.0})  # random weights: near-ties everywhere
    assert bert.check(path=tmp_path / "same.onnx", tolerance=loose)["metrics"]["relative_rms"] > 1e-3
    quantize(raw_graph("bert", 1), tmp_path / "other.onnx")
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


def test_a_model_without_scores_needs_a_limit_on_differences(model_folder, raw_graph, documents, tmp_path):
    features = Bench(model_folder("bert_features"), raw_graph("bert_features"), documents, tmp_path)
    anything = Parity.model_validate({"int8": {"relative_rms": None}}).int8
    with pytest.raises(GateFailed, match="no scores whose highest could agree, and no limit on differences"):
        features.check(tolerance=anything)

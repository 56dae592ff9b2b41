"""`verify export`: honest exports pass again, a fault is found in the file that holds it and named by its node."""

import json
import re
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export import verify
from export.bisect import first_departure, first_module
from export.cases import full_rows
from export.dynamic import quantize
from export.io_spec import read_spec
from export.probe import Probe
from export.to_onnx import export_graph, load_model
from tests.export.conftest import GATES
from tests.export.test_parity import ignore_mask
from tests.export.test_variants import plant_overflow
from trainer.__main__ import main
from trainer.artifact import hash_file
from trainer.config import Recipe
from trainer.export_config import Export


@pytest.fixture(scope="module")
def bert(model_folder, raw_graph, documents):
    spec = read_spec(model_folder("bert"))
    return raw_graph("bert"), full_rows(documents, spec, 2, 16).inputs


def scale_weight(path, target, part, factor=1.01):
    """A copy of a graph with one weight scaled; returns the nodes that read it."""
    model = onnx.load(path)
    weight = next(one for one in model.graph.initializer if part in one.name)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))
    onnx.save(model, target)
    return [node.name for node in model.graph.node if weight.name in node.input]


@pytest.mark.parametrize(
    "part", ["layer.0.output.LayerNorm.weight", "layer.1.attention.self.query.bias", "position_embeddings"]
)
def test_the_node_that_reads_a_changed_weight_is_named(bert, part, tmp_path):
    raw, inputs = bert
    readers = scale_weight(raw, tmp_path / "faulty.onnx", part)
    found = first_departure(Probe(raw, 1), Probe(tmp_path / "faulty.onnx", 1), inputs, 1e-5)
    assert found is not None and found.node in readers
    assert found.inputs_relative_rms <= 1e-5 < found.relative_rms
    if "layer" in part:
        assert found.module.startswith("model.bert.encoder.layer." + part.split(".")[1])


def test_honest_forms_do_not_depart(bert, tmp_path):
    raw, inputs = bert
    assert first_departure(Probe(raw, 1), Probe(raw, 1), inputs, 1e-7) is None
    quantize(raw, tmp_path / "int8.onnx")
    assert first_departure(Probe(raw, 1), Probe(tmp_path / "int8.onnx", 1), inputs, 0.3) is None
    found = first_departure(Probe(raw, 1), Probe(tmp_path / "int8.onnx", 1), inputs, 1e-4)
    assert found is not None and found.relative_rms > 1e-4  # the first product that was quantized


def test_a_fault_in_a_quantized_form_is_named(bert, tmp_path):
    """Its own rounding stays below the limit, the fault does not."""
    raw, inputs = bert
    readers = scale_weight(raw, tmp_path / "faulty.onnx", "layer.1.output.LayerNorm.weight", factor=3.0)
    quantize(tmp_path / "faulty.onnx", tmp_path / "int8.onnx")
    found = first_departure(Probe(raw, 1), Probe(tmp_path / "int8.onnx", 1), inputs, 0.3)
    assert found is not None and found.node in readers


def test_an_overflow_is_a_departure(bert, tmp_path):
    from export.precision import lower

    raw, inputs = bert
    plant_overflow(raw, tmp_path / "planted.onnx")
    lower(tmp_path / "planted.onnx", tmp_path / "low.onnx", "fp16", set())
    found = first_departure(Probe(tmp_path / "planted.onnx", 1), Probe(tmp_path / "low.onnx", 1), inputs, 0.1)
    assert found is not None and found.node == "planted_huge" and not found.relative_rms <= 1.0


def test_the_module_whose_graph_is_wrong_is_named(bert, model_folder, tmp_path):
    """Against PyTorch: one with a weight of its own, and attention, whose nodes hold none. An honest graph agrees."""
    raw, inputs = bert
    folder = model_folder("bert")
    spec = read_spec(folder)
    model, faulty = load_model(folder, spec), tmp_path / "faulty.onnx"
    assert first_module(model, spec, Probe(raw, 1), inputs, 1e-5) is None
    scale_weight(raw, faulty, "layer.1.output.LayerNorm.weight")
    found = first_module(model, spec, Probe(faulty, 1), inputs, 1e-5)
    assert found is not None and (found.module, found.kind) == (
        "model.bert.encoder.layer.1.output.LayerNorm",
        "LayerNorm",
    )
    graph = onnx.load(raw)
    softmax = next(node for node in graph.graph.node if node.op_type == "Softmax")
    softmax.attribute[0].i = 2  # of the rows of scores instead of their columns
    onnx.save(graph, faulty)
    found = first_module(model, spec, Probe(faulty, 1), inputs, 1e-5)
    assert (
        found is not None and found.module == "model.bert.encoder.layer.0.attention.self" and found.relative_rms > 0.01
    )


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_a_fault_of_the_exporter_is_told_by_its_module(variant, model_folder, tmp_path, monkeypatch, capsys):
    """The graph made anew has the fault as well, so that no node departs from it; fp32 is held though int8, under whose
    gate it would pass, is all that the recipe names."""

    def faulty(model, spec, path, opset):
        export_graph(model, spec, path, opset)
        scale_weight(path, path, "layer.0.output.LayerNorm.weight")

    monkeypatch.setattr(verify, "export_graph", faulty)
    recipe = tmp_path / "recipe.yaml"
    export = {"models": {"m": str(model_folder("bert"))}, "quality": None, "variants": [variant]}
    export["parity"] = {"int8": {"relative_rms": 0.25, "min_top1": 0.0}}
    recipe.write_text(json.dumps({"run_dir": str(tmp_path / "run"), "export": export}))
    assert main(["verify", "export", str(recipe), "--bisect"]) == 1
    said = capsys.readouterr().err
    assert "m fp32 (model.onnx): case" in said and "m int8" not in said
    assert "which is not the model: module model.bert.encoder.layer.0.output.LayerNorm (LayerNorm)" in said


def test_the_verb_holds_what_was_exported_against_its_source(bert, model_folder, raw_graph, tmp_path, capsys):
    """One form honest, then with a fault in its file; the other was never exported, and is made to be held."""
    run_dir = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    loose = {"int8": {"relative_rms": 0.15, "min_top1": 0.0}, "shapes": [[2, 9]]}
    export = {"models": {"m": str(model_folder("bert"))}, "quality": None, "parity": loose}
    recipe.write_text(json.dumps({"run_dir": str(run_dir), "export": export}))
    exported = run_dir / "export" / "m" / "model.onnx"
    exported.parent.mkdir(parents=True)
    shutil.copyfile(raw_graph("bert"), exported)
    assert main(["verify", "export", str(recipe)]) == 0
    report = json.loads((run_dir / "verify" / "export.json").read_text())
    assert [(row["variant"], row["exported"], row["passed"]) for row in report["rows"]] == [
        ("fp32", True, True),
        ("int8", False, True),
    ]
    readers = scale_weight(exported, exported, "layer.1.output.LayerNorm.weight")
    before = hash_file(exported)
    assert main(["verify", "export", str(recipe), "export.variants=[fp32]", "--bisect"]) == 1
    said = capsys.readouterr().err
    assert "m fp32 (model.onnx): case " in said
    assert f"first departure, in case 2x16: node {readers[0]} (LayerNorm" in said
    assert hash_file(exported) == before and [file.name for file in exported.parent.iterdir()] == ["model.onnx"]
    assert main(["verify", "resume", str(recipe), "--bisect"]) == 2


def swap_pasts(graph):
    """Each layer of two reads the keys that the other one made."""
    names = [f"past_key_values.{layer}.key" for layer in (0, 1)]
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = names[1 - names.index(name)]


@pytest.mark.parametrize(
    ("name", "form", "fault", "case"),
    [
        ("bert", "fp32", ignore_mask, r"\dx\d+"),
        ("gpt2", "fp32", ignore_mask, r"\dx\d+"),
        ("gpt2", "fp32", swap_pasts, r"\dx\d after \d+( padded \w+)?"),
        ("gpt2", "int8", swap_pasts, r"1x\d after \d+"),
    ],
)
def test_a_fault_that_needs_padding_or_a_past_is_named(
    name, form, fault, case, model_folder, exported_folder, tmp_path
):
    """On a batch that has neither, nothing departs; the int8 form has attention as one node."""
    exported = tmp_path / "export" / "m"
    shutil.copytree(exported_folder(name), exported)
    file = exported / {"fp32": "model.onnx", "int8": "model_quantized.onnx"}[form]
    model = onnx.load(file)
    fault(model.graph)
    onnx.save(model, file)
    settings = Export.model_validate(GATES)
    rows = {
        row["variant"]: row
        for row in verify.verify_model(Recipe(run_dir=tmp_path), settings, "m", model_folder(name), bisect=True)
    }
    assert not rows[form]["passed"]
    assert re.search(rf"first departure, in case {case}: node \w+ ", rows[form]["found"]), rows[form]["found"]

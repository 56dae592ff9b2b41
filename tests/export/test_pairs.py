"""What encoder-decoders are for: the perplexity of a text's later half, of both graphs together, and every fault that
costs some of it is caught by the gate that should."""

import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoModelForSeq2SeqLM

from export import verify
from export.bench_inputs import quality_batches
from export.export import check_quality_gates
from export.gates import Gates, TaskGate
from export.io_spec import read_spec
from export.runners import open_onnx, open_onnx_graphs, open_torch_pair
from export.scores import score
from export.variants import make_variant
from export.verified import subjects
from tests.export.conftest import PAIR_GATES
from trainer.artifact import read_artifact, write_json
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError
from trainer.export_config import Calibration, Export

NAMES = ("t5", pytest.param("bart", marks=pytest.mark.slow))
SETTINGS = Export.model_validate(PAIR_GATES)
_LOOSE = {"fp32": {"relative_rms": 1e3, "max_abs": None, "min_top1": 0.0}, "shapes": [[3, 9]]}
ANYTHING = Export.model_validate(PAIR_GATES | {"parity": _LOOSE})
# What int8 may be off, as in the other tests.
_ROUNDED = dict.fromkeys(("int8_static", "int4"), PAIR_GATES["parity"]["int8"])
QUANTIZED = Export.model_validate(PAIR_GATES | {"parity": PAIR_GATES["parity"] | _ROUNDED})


def test_rows_are_split_in_the_middle(model_folder, documents):
    """The encoder reads the first half; the decoder reads the second one place later, which is its target."""
    folder = model_folder("bart")
    spec = read_spec(folder)
    rows = [np.arange(5, 16), np.arange(20, 28), np.arange(30, 39)]
    (batch,) = quality_batches(rows, spec, folder, 11, 3, seed=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [20, 21, 22, 23, 0], [30, 31, 32, 33, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 4 + [0], [1] * 4 + [0]]
    assert batch["labels"].tolist() == [[10, 11, 12, 13, 14, 15], [24, 25, 26, 27, -100, -100],
                                        [34, 35, 36, 37, 38, -100]]  # fmt: skip
    assert batch["decoder_input_ids"].tolist() == [[3, 10, 11, 12, 13, 14], [3, 24, 25, 26, 27, 0],
                                                   [3, 34, 35, 36, 37, 38]]  # fmt: skip
    with pytest.raises(UserError, match="no document is long enough to measure quality on"):
        quality_batches(documents, spec, folder, 1, 3, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_is_that_of_the_models_own_loss(name, trained_pair, pieces):
    folder = trained_pair(name)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    batches = quality_batches(pieces, read_spec(folder), folder, 16, 40, seed=0)
    total, count = 0.0, 0
    for batch in batches:
        tensors = {key: torch.from_numpy(value) for key, value in batch.items() if key != "decoder_input_ids"}
        with torch.no_grad():
            loss = model(**tensors).loss.item()  # shifts the labels itself
        targets = int((batch["labels"] >= 0).sum())
        total, count = total + loss * targets, count + targets
    found = score(open_torch_pair(folder, 1), batches, "perplexity")
    assert found.value == pytest.approx(np.exp(total / count), rel=1e-4) and found.value < 20
    assert found.counts_R.sum() == count and len(found.sums_R) == 40


@pytest.mark.parametrize("name", NAMES)
def test_each_form_is_held_by_both_gates(name, exported_pair):
    evidence = {proof["what"]: proof for proof in read_artifact(exported_pair(name))["evidence"]}
    assert list(evidence) == [f"{what}_{form}" for form in ("fp32", "int8")
                              for what in ("encoder_parity", "parity", "quality")]  # fmt: skip
    exact, rounded = evidence["quality_fp32"], evidence["quality_int8"]
    assert exact["metrics"]["kept"] == pytest.approx(1.0, abs=1e-4) and exact["metrics"]["metric"] == "perplexity"
    assert [exact["metrics"][end] for end in ("kept_low", "kept_high")] == pytest.approx([1, 1], abs=1e-5)
    assert exact["thresholds"] == {"share": 0.95} and exact["metrics"]["sequences"] == 40
    assert rounded["metrics"]["kept"] >= 0.95
    assert rounded["file"] == "decoder_with_past_model_quantized.onnx"
    assert rounded["encoder"]["sha256"] == evidence["encoder_parity_int8"]["sha256"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("form", "operator"), [("int8_static", "DequantizeLinear"), ("int4", "MatMulNBits")])
def test_ranges_and_4_bits_pass_the_gates_too(name, form, operator, exported_pair, trained_pair, pieces, tmp_path):
    """Each graph by its tensors, both together by their quality."""
    folder, exported = trained_pair(name), exported_pair(name)
    spec = read_spec(folder)
    for part in spec.parts:
        gates = Gates(folder, part, QUANTIZED, pieces, lambda needed: pieces, seed=0)
        raw, graph = exported / part.file("fp32"), tmp_path / part.file(form)
        make_variant(form, raw, graph, lambda gates=gates: gates.calibration, Calibration())
        (proof,) = gates.check(name, form, graph, open_onnx(graph, 1))
        assert proof["what"] == f"{part.prefix}parity_{form}" and proof["metrics"]["relative_rms"] > 0.005
        held = onnx.load(raw).graph
        constants = {one.name for one in held.initializer}
        weighed = [node for node in held.node if node.op_type == "MatMul" and node.input[1] in constants]
        rounded = [node for node in onnx.load(graph).graph.node if node.op_type == operator]
        assert len(rounded) >= len(weighed) > 0
    files = [tmp_path / file for file in spec.files(form)]
    whole = TaskGate(folder, spec, QUANTIZED, pieces, seed=0)
    (proof,) = whole.check(name, form, files, open_onnx_graphs(files, spec, 1))
    assert proof["what"] == f"quality_{form}" and proof["metrics"]["kept"] >= 0.95


def cross_weight(graph):
    """The initializer that the output projection of the first layer's cross-attention reads, whatever it is called."""
    node = next(node for node in graph.node for key in ("EncDecAttention/o", "encoder_attn/out_proj")
                if node.op_type == "MatMul" and key in str(node.metadata_props).replace(".", "/"))  # fmt: skip
    return next(one for one in graph.initializer if one.name in node.input)


@pytest.mark.parametrize("name", NAMES)
def test_a_moved_cross_attention_weight_is_caught_by_both_gates(name, exported_pair, trained_pair, pieces, tmp_path):
    """By tensors; and, where their limits let everything pass, by what the model is for. (An encoder's mask that is
    ignored, of which rows without padding know nothing, is the tensors' matter: test_seq2seq.)"""
    folder, exported = trained_pair(name), exported_pair(name)
    spec = read_spec(folder)
    faulty = tmp_path / spec.file("fp32")
    model = onnx.load(exported / faulty.name)
    weight = cross_weight(model.graph)
    moved = np.ascontiguousarray(np.roll(numpy_helper.to_array(weight), 1, axis=0))
    weight.CopyFrom(numpy_helper.from_array(moved, weight.name))
    onnx.save(model, faulty)
    gates = Gates(folder, spec, SETTINGS, pieces, lambda needed: pieces, seed=0)
    with pytest.raises(GateFailed, match=r"m: case .* output"):
        gates.check("m", "fp32", faulty, open_onnx(faulty, 1))
    gates.settings = ANYTHING
    assert [one["what"] for one in gates.check("m", "fp32", faulty, open_onnx(faulty, 1))] == ["parity_fp32"]
    whole = TaskGate(folder, spec, ANYTHING, pieces, seed=0)
    files = [exported / spec.files("fp32")[0], faulty]
    with pytest.raises(GateFailed, match=r"m: perplexity .* of its source's quality is kept"):
        whole.check("m", "fp32", files, open_onnx_graphs(files, spec, 1))


def test_labelled_text_is_not_for_language_models(model_folder, capsys):
    specs = {name: read_spec(model_folder(name)) for name in ("t5", "bart")}
    check_quality_gates(SETTINGS, specs)
    assert capsys.readouterr().out == ""  # each has a gate on its quality
    labelled = Export.model_validate(PAIR_GATES | {"quality": {"labelled": "rows.jsonl"}})
    with pytest.raises(UserError, match=r"(?s)models are of seq2seq_lm.*encoder-decoders too, are judged by"):
        check_quality_gates(labelled, specs)


def test_what_was_exported_without_the_gate_on_quality_is_exported_again(exported_pair, trained_pair, tmp_path):
    """As all encoder-decoders were, before there was one for them."""
    shutil.copytree(exported_pair("t5"), tmp_path / "export" / "t5")
    export = PAIR_GATES | {"models": {"t5": str(trained_pair("t5"))}}
    recipe = Recipe.model_validate({"run_dir": tmp_path, "export": export})
    (subject,) = subjects(recipe, "pack", ())
    assert [file.name for file in subject.variants["int8"].files] == list(subject.spec.files("int8"))
    record = read_artifact(tmp_path / "export" / "t5")
    kept = [proof for proof in record["evidence"] if not proof["what"].startswith("quality")]
    write_json(tmp_path / "export" / "t5" / "artifact.json", record | {"evidence": kept})
    with pytest.raises(GateFailed, match="has not passed the export.quality of this recipe"):
        subjects(recipe, "pack", ())


def test_verify_holds_both_graphs_and_the_whole(exported_pair, trained_pair, pieces, monkeypatch, tmp_path):
    """The two graphs of a form have a row each, and what they are for together has one."""
    monkeypatch.setattr(verify, "load_documents", lambda recipe, model: pieces)
    shutil.copytree(exported_pair("t5"), tmp_path / "export" / "t5")
    folder, settings = trained_pair("t5"), Export.model_validate(PAIR_GATES | {"variants": "auto"})
    rows = list(verify.verify_model(Recipe(run_dir=tmp_path), settings, "t5", folder, bisect=False))
    spec = read_spec(folder)
    assert [(row["variant"], row["file"], row["passed"], row["exported"]) for row in rows] == [
        *((form, part.file(form), True, True) for part in spec.parts for form in ("fp32", "int8")),
        *((form, " and ".join(spec.files(form)), True, True) for form in ("fp32", "int8")),
    ]
    assert list(rows[-1]["found"]) == ["quality_int8"]

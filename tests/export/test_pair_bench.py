"""The benchmark of encoder-decoders: a call is the encoder's and the decoder's first step, and both files are held to
their evidence, counted and audited."""

import json
import re
import shutil
from dataclasses import asdict

import numpy as np
import onnx
import pytest

from export import bench as stage
from export.bench_inputs import Cell, prompts_of, speed_arrays
from export.bench_worker import Job, graphs_of
from export.io_spec import IoSpec, read_spec
from export.load_worker import Service, open_service
from export.report import proofs
from export.results import read_results
from export.roofline import limit_of, work_of
from export.runners import open_runner
from export.windows import Settings
from tests.export.conftest import PAIR_GATES
from trainer.config import Recipe
from trainer.errors import UserError
from trainer.export_config import Bench


@pytest.fixture
def recipe(exported_pair, trained_pair, pieces, monkeypatch, tmp_path):
    """A run folder with an export that a test may damage, and its recipe."""
    monkeypatch.setattr(stage, "load_documents", lambda recipe, model: pieces)
    shutil.copytree(exported_pair("t5"), tmp_path / "export" / "t5")

    def make(**bench) -> Recipe:
        section = {
            "backends": ["eager", "onnx_fp32", "onnx_int8"],
            "batch_sizes": [2],
            "sequence_lengths": [8, 70],
            "threads": 1,
            "window_s": 0.01,
            "max_windows": 3,  # a busy machine is soon given up
            "stability": 0.99,
            "quality_sequences": 40,
        }
        export = PAIR_GATES | {"models": {"t5": str(trained_pair("t5"))}}
        return Recipe.model_validate({"run_dir": tmp_path, "export": export, "bench": section | bench})

    return make


def test_the_whole_stage_writes_the_rows_that_decoders_have(recipe, tmp_path, monkeypatch):
    """Source lengths up to 70 of 72 have room for 16 new tokens: they are in the decoder, not behind the text."""
    rates = {"fp32_per_s": 1e11, "int8_per_s": 4e11, "bytes_per_s": 1e10}  # a busy machine's are not known
    monkeypatch.setattr(stage, "measure_rates", lambda *_: rates)
    one = recipe(load={"p99_limit_ms": 5000, "rates": [2000], "seconds": 0.05, "backends": ["onnx_int8"]})
    stage.run(one)
    report = json.loads((tmp_path / "bench" / "report.json").read_text())
    backends = ("eager", "onnx_fp32", "onnx_int8")
    assert [(row["backend"], row["sequence_length"]) for row in report["rows"]] == [
        (backend, length) for backend in backends for length in (8, 70)
    ]
    for row in report["rows"]:
        assert row["status"] in ("ok", "unstable"), row
        if row["status"] == "ok":
            assert row["real_tokens_per_s"] == pytest.approx(row["samples_per_s"] * row["sequence_length"])
            assert row["limit_share"] > 0 and row["limit"] in ("memory", "compute")
    assert [(row["backend"], row["prompt_tokens"], row["new_tokens"]) for row in report["decode"]] == [
        (backend, length, 16) for backend in backends for length in (8, 70)
    ]
    for row in report["decode"]:
        assert row["status"] in ("ok", "unstable"), row
        if row["status"] == "ok":
            assert row["first_token_ms"] > 0 and row["limit_share"] > 0
            whole_s = (row["first_token_ms"] + 15 * row["token_ms"]) / 1e3
            assert row["tokens_per_s"] == pytest.approx(2 * 16 / whole_s)
    sizes = {row["backend"]: row["file_mib"] for row in report["rows"]}
    files = [tmp_path / "export" / "t5" / file for file in ("encoder_model.onnx", "decoder_with_past_model.onnx")]
    assert sizes["onnx_int8"] < sizes["onnx_fp32"] == sum(file.stat().st_size for file in files) / 2**20
    nodes = {row["backend"]: row["nodes"] for row in report["rows"]}
    assert nodes["eager"] is None and set(nodes["onnx_fp32"]) == {"CPUExecutionProvider"}
    values = {entry["backend"]: entry["value"] for entry in report["quality"]}
    assert values["eager"] == pytest.approx(values["onnx_fp32"], rel=1e-4)
    assert values["eager"] < values["onnx_int8"] * 1.05 and {one["metric"] for one in report["quality"]} == {
        "perplexity"
    }
    (load,) = report["load"]
    assert load["status"] in ("ok", "unstable") and load["most_per_s"] > 0
    found = read_results(one)
    assert found.verified == {("t5", "onnx_fp32"): True, ("t5", "onnx_int8"): True}
    exact, rounded = proofs(found)
    assert exact["passed"] and exact["metrics"]["relative_rms"] < 1e-5 < rounded["metrics"]["relative_rms"]
    assert re.match(r"100\.0% of perplexity \(", exact["quality"])
    alone = [entry["metrics"] for entry in found.exported["t5"]["evidence"] if entry["what"].endswith("parity_int8")]
    assert len(alone) == 2
    assert rounded["metrics"]["relative_rms"] == max(metrics["relative_rms"] for metrics in alone)


def change(file):
    graph = onnx.load(file)
    graph.producer_name = "another"
    onnx.save(graph, file)


@pytest.mark.parametrize("file", ["encoder_model.onnx", "decoder_with_past_model.onnx"])
def test_either_graph_without_evidence_refuses_the_row(file, recipe, tmp_path, monkeypatch):
    one = recipe()
    subject = stage.prepare_subject(one, one.bench, "t5", one.export.models["t5"], tmp_path)
    assert [stage.refusal(subject, backend) for backend in one.bench.backends] == ["", "", ""]
    change(tmp_path / "export" / "t5" / file)
    monkeypatch.setattr(stage, "run_worker", None)  # a refused backend starts no process
    found = stage.measure_backend(subject, "onnx_fp32", one.bench, 1, tmp_path)
    assert {(row["status"], row["reason"]) for row in found["rows"]} == {
        ("refused", f"{file} is not the file that passed parity")
    }
    (tmp_path / "export" / "t5" / file).unlink()
    assert stage.refusal(subject, "onnx_fp32") == f"{file} was not exported"
    assert stage.file_mib(subject, "onnx_fp32") is None
    assert stage.refusal(subject, "onnx_int8") == ""


def test_nodes_of_both_graphs_that_ran_elsewhere_refuse_their_rows(recipe, tmp_path):
    one = recipe(sequence_lengths=[8], decode=None)
    subject = stage.prepare_subject(one, one.bench, "t5", one.export.models["t5"], tmp_path)
    settings = one.bench.model_copy(update={"provider": "AzureExecutionProvider"})
    (row,) = stage.measure_backend(subject, "onnx_fp32", settings, 1, tmp_path)["rows"]
    seen = re.match(r"(\d+) of (\d+) nodes did not run on AzureExecutionProvider: ", row["reason"])
    counted = [
        len(onnx.load(subject.exported / file, load_external_data=False).graph.node)
        for file in subject.spec.files("fp32")
    ]
    assert row["status"] == "refused" and seen and int(seen[2]) > max(counted) / 2


def test_each_graph_is_audited_on_what_a_call_gives_it(exported_pair, trained_pair, pieces):
    spec = read_spec(trained_pair("t5"))
    folder = exported_pair("t5")
    runner = open_runner(folder, "onnx_int8", 1, spec=spec)
    arrays = speed_arrays(pieces, spec, [Cell(3, 8, "real")], seed=0)
    inputs = {name.removeprefix("cell0|"): value for name, value in arrays.items()}
    assert set(inputs) == {"input_ids", "attention_mask"} and (inputs["attention_mask"].sum(axis=1) <= 8).all()
    job = Job(str(folder), "onnx_int8", 1, 0, None, Settings(1, 0.01, 3, 0.1), "", "", True, 0, 0, False, asdict(spec))
    assert IoSpec.of_record(json.loads(json.dumps(job.pair))) == spec
    (encoder, given), (decoder, step) = graphs_of(job, runner, inputs)
    assert (encoder.name, decoder.name) == ("encoder_model_quantized.onnx", "decoder_with_past_model_quantized.onnx")
    assert given is inputs and step["input_ids"].tolist() == [[spec.start_id]] * 3
    np.testing.assert_array_equal(runner.run(inputs)["logits"], runner.decoder.run(step)["logits"])


def test_a_text_and_its_answer_have_room_of_their_own(model_folder, tmp_path, recipe):
    spec = read_spec(model_folder("t5"))
    assert prompts_of(Bench(batch_sizes=(1,), sequence_lengths=(8, 72, 73)), spec) == [(1, 8), (1, 72)]
    one = recipe(decode={"prompt_lengths": [72], "new_tokens": 73})
    with pytest.raises(UserError, match="bench.decode takes 73\nNeeded: at most 72, what t5 takes"):
        stage.prepare_subject(one, one.bench, "t5", one.export.models["t5"], tmp_path)


def test_a_server_under_load_answers_with_new_tokens(exported_pair):
    service = Service(str(exported_pair("t5")), "onnx_fp32", "CPUExecutionProvider", 1, "", 8, 0.0, new_tokens=5)
    rows = open_service(service)([np.arange(5, 12), np.arange(20, 23)])
    assert [len(row) for row in rows] == [5, 5]


@pytest.mark.parametrize("name", ["t5", "mt5", "bart"])
def test_the_work_of_both_graphs_is_that_of_their_matrices(name, model_folder):
    """Counted from the model itself: every Linear layer, keys and values of what was encoded on the encoder's side."""
    import torch

    from export.to_onnx import load_model

    folder = model_folder(name)
    spec = read_spec(folder)
    work = work_of(folder, spec)
    sizes = {key: module.weight.numel() for key, module in load_model(folder, spec).named_modules()
             if isinstance(module, torch.nn.Linear)}  # fmt: skip
    crossed = ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")
    encoding = sum(size for key, size in sizes.items() if "encoder." in key or key.endswith(crossed))
    assert work.encoder.multiplying == encoding
    assert work.multiplying == sum(sizes.values()) - encoding
    assert (work.layers, work.encoder.layers) == (2, 1 if name == "bart" else 2)
    rates = {"fp32_per_s": 1e9, "bytes_per_s": 1e15}  # products bind
    row = {"backend": "eager", "batch_size": 3, "padded_tokens": 24, "p50_ms": 1.0, "file_mib": 1.0}
    found = limit_of(row, work, rates)
    operations = 2 * encoding * 24 + 4 * work.encoder.layers * work.width * 8 * 24
    operations += 2 * work.multiplying * 3 + 4 * 2 * work.width * 8 * 3
    assert found == {"limit_share": pytest.approx(operations / 1e6), "limit": "compute"}
    row = {"backend": "eager", "batch_size": 3, "prompt_tokens": 8, "new_tokens": 4, "token_ms": 1.0, "file_mib": 1.0}
    operations = 2 * work.multiplying * 3 + 4 * 2 * work.width * 10 * 3
    assert limit_of(row, work, rates)["limit_share"] == pytest.approx(operations / 1e6)

"""The bench stage: only verified files get figures, every backend sees the same inputs, quality is computed right."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export import bench as stage
from export import bench_worker
from export.bench_inputs import Cell, grid, prompt_arrays, prompts_of, quality_batches, speed_arrays
from export.bench_table import describe_noise, reasons
from export.bench_worker import (
    check_compiled,
    describe,
    describe_decode,
    measure_decode,
    peak_memory_mib,
    reset_peak_memory,
)
from export.export import export_model
from export.io_spec import read_spec
from export.runners import open_onnx, open_torch
from export.scores import score
from export.windows import Measurement, Settings, SystemClock, Window
from tests.export.conftest import build_tokenizer
from trainer import environment
from trainer.artifact import content_hash, hash_file, read_artifact, write_json
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError
from trainer.export_config import Bench, Export

EXPORT = Export.model_validate(
    {"quality": None, "parity": {"shapes": [[2, 9]], "int8": {"relative_rms": 0.15, "min_top1": 0.0}}}
)


@pytest.fixture(scope="module")
def exported(model_folder, documents, tmp_path_factory):
    """A run folder with one exported model `m`; copied by the tests that damage it."""
    root = tmp_path_factory.mktemp("run")
    export_model(Recipe(run_dir=root), EXPORT, "m", model_folder("bert"), documents)
    return root


def make_recipe(root, folder, **bench):
    section = {
        "backends": ["eager", "onnx_fp32", "onnx_int8"],
        "batch_sizes": [2],
        "sequence_lengths": [8, 16],
        "threads": 1,
        "window_s": 0.01,
        "stability": 0.99,
        "quality_sequences": 20,
    }
    export = EXPORT.model_dump() | {"models": {"m": folder}}
    return Recipe.model_validate({"run_dir": root, "export": export, "bench": section | bench})


def subject_of(root, folder, documents, monkeypatch, scratch):
    monkeypatch.setattr(stage, "load_documents", lambda recipe, model: documents)
    recipe = make_recipe(root, folder)
    return stage.prepare_subject(recipe, recipe.bench, "m", folder, scratch)


def test_the_whole_stage_writes_its_report(exported, model_folder, documents, monkeypatch, capsys):
    monkeypatch.setattr(stage, "load_documents", lambda recipe, model: documents)
    stage.run(make_recipe(exported, model_folder("bert")))
    report = json.loads((exported / "bench" / "report.json").read_text())
    assert [(row["backend"], row["batch_size"], row["sequence_length"]) for row in report["rows"]] == [
        (backend, 2, length) for backend in ("eager", "onnx_fp32", "onnx_int8") for length in (8, 16)
    ]
    for row in report["rows"]:
        assert row["status"] in ("ok", "unstable"), row  # a busy machine makes rows unstable, nothing else may
        assert row["peak_memory_mib"] > 10
        assert row["threads"] == 1
        if row["status"] == "ok":
            assert row["p50_ms"] > 0 and row["calls"] >= 9
            assert row.get("limit_share", 1) > 0 and row.get("limit", "memory") in ("memory", "compute")
            assert row["cold_start_s"] is None or row["cold_start_s"] > row["p50_ms"] / 1e3
            assert row["real_tokens_per_s"] == pytest.approx(row["samples_per_s"] * row["sequence_length"])
    nodes = {row["backend"]: row["nodes"] for row in report["rows"]}
    assert nodes["eager"] is None
    assert set(nodes["onnx_fp32"]) == {"CPUExecutionProvider"} and nodes["onnx_fp32"]["CPUExecutionProvider"] > 30
    assert {"fp32_per_s", "int8_per_s", "bytes_per_s"} <= set(report["rates"])
    assert report["decode"] == report["load"] == []
    noise = report["noise"]
    if any(row["status"] == "ok" and row["backend"].startswith("onnx") for row in report["rows"]):
        assert noise["model"] == "m" and noise["backend"].startswith("onnx")
        twice = {(shape["sequence_length"], shape["p50_ms"]) for shape in noise["shapes"]}
        assert twice <= {(row["sequence_length"], row.get("p50_ms")) for row in report["rows"]}
        assert noise["relative"] == max((shape["relative"] for shape in noise["shapes"]), default=None)
    sizes = {row["backend"]: row["file_mib"] for row in report["rows"]}
    assert sizes["onnx_int8"] < sizes["onnx_fp32"]
    values = {entry["backend"]: entry["value"] for entry in report["quality"]}
    assert values["eager"] == values["onnx_fp32"]
    assert {entry["metric"] for entry in report["quality"]} == {"masked_accuracy"}
    model = open_torch(model_folder("bert"), 1).call.model
    hashes = {"model": content_hash(model_folder("bert")), "export": content_hash(exported / "export" / "m")}
    assert report["models"]["m"]["sha256"] == hashes
    assert report["models"]["m"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert "onnx_int8" in capsys.readouterr().out


def damage_file(folder):
    graph = onnx.load(folder / "model.onnx")
    graph.producer_name = "another"
    onnx.save(graph, folder / "model.onnx")


def drop_evidence(folder):
    record = read_artifact(folder)
    write_json(folder / "artifact.json", record | {"evidence": record["evidence"][1:]})


def other_parent(folder):
    record = read_artifact(folder)
    write_json(folder / "artifact.json", record | {"parents": {"model": "0" * 64}})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_file, "model.onnx is not the file that passed parity"),
        (drop_evidence, "no parity evidence for model.onnx"),
        (other_parent, "model.onnx was exported from another model"),
        (lambda folder: (folder / "model.onnx").unlink(), "model.onnx was not exported"),
        (shutil.rmtree, "model.onnx was not exported"),
    ],
)
def test_rows_without_evidence_are_refused(damage, reason, exported, model_folder, documents, monkeypatch, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(exported, root)
    damage(root / "export" / "m")
    subject = subject_of(root, model_folder("bert"), documents, monkeypatch, tmp_path)
    monkeypatch.setattr(stage, "run_worker", None)  # a refused backend starts no process
    found = stage.measure_backend(subject, "onnx_fp32", make_recipe(root, subject.model).bench, 1, tmp_path)
    rows = found["rows"]
    assert [(row["status"], row["reason"]) for row in rows] == [("refused", reason)] * 2
    assert set(found) == {"rows"}
    assert all("p50_ms" not in row for row in rows)


def test_verified_files_are_not_refused(exported, model_folder, documents, monkeypatch, tmp_path):
    subject = subject_of(exported, model_folder("bert"), documents, monkeypatch, tmp_path)
    assert [stage.refusal(subject, backend) for backend in ("eager", "onnx_fp32", "onnx_int8")] == ["", "", ""]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "needs a C++ compiler" in stage.refusal(subject, "compile")


def test_a_worker_that_dies_fails_the_stage_after_the_report(exported, model_folder, documents, monkeypatch, tmp_path):
    """The graph file is no graph, but its evidence was forged to match: ONNX Runtime refuses it in the worker."""
    root = tmp_path / "run"
    shutil.copytree(exported, root)
    file = root / "export" / "m" / "model.onnx"
    file.write_bytes(b"not a graph")
    record = read_artifact(file.parent)
    record["evidence"][0]["sha256"] = hash_file(file)
    write_json(file.parent / "artifact.json", record)
    monkeypatch.setattr(stage, "load_documents", lambda recipe, model: documents)
    recipe = make_recipe(root, model_folder("bert"), backends=["onnx_fp32"])
    with pytest.raises(GateFailed, match=r"2 rows failed; the first, m onnx_fp32: .*model.onnx"):
        stage.run(recipe)
    rows = json.loads((root / "bench" / "report.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["failed", "failed"]


def test_nodes_that_ran_elsewhere_refuse_their_rows(exported, model_folder, documents, monkeypatch, tmp_path):
    """A provider that ONNX Runtime has and opens here, and that runs none of these nodes: all fall to the CPU."""
    subject = subject_of(exported, model_folder("bert"), documents, monkeypatch, tmp_path)
    settings = make_recipe(exported, subject.model).bench.model_copy(update={"provider": "AzureExecutionProvider"})
    found = stage.measure_backend(subject, "onnx_fp32", settings, 1, tmp_path)
    assert set(found) == {"rows"}
    for row in found["rows"]:
        assert row["status"] == "refused" and "p50_ms" not in row
        assert re.match(r"\d+ of \d+ nodes did not run on AzureExecutionProvider: \d+ \w+, ", row["reason"])


def test_a_provider_that_is_not_installed_stops_before_anything_is_measured(exported, model_folder, monkeypatch):
    monkeypatch.setattr(stage, "run_worker", None)
    recipe = make_recipe(exported, model_folder("bert"), provider="CUDAExecutionProvider")
    with pytest.raises(UserError, match="this ONNX Runtime has") as caught:
        stage.run(recipe)
    assert type(caught.value) is UserError


def test_bf16_is_not_measured_where_nothing_runs_it(exported, model_folder):
    """Its export can be had, as the gates round in fp32; a speed cannot."""
    with pytest.raises(UserError, match=r"bf16.onnx does not open on CPUExecutionProvider: .*Add"):
        stage.run(make_recipe(exported, model_folder("bert"), backends=["onnx_bf16"]))


def test_a_gpus_report_names_card_and_driver(monkeypatch, tmp_path):
    """As NVIDIA's tool does, for which a script stands in here; the CPU's names none."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$1" in *driver*) echo 570.86.10;; *) echo "NVIDIA H200, 143771 MiB";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environment.nvidia_smi.cache_clear()
    found = stage.describe_machine(1, "CUDAExecutionProvider")
    environment.nvidia_smi.cache_clear()
    assert (found["gpus"], found["driver"]) == (["NVIDIA H200, 143771 MiB"], "570.86.10")
    assert not {"gpus", "driver"} & set(stage.describe_machine(1))


def test_without_a_stable_row_there_is_no_noise(monkeypatch, tmp_path):
    monkeypatch.setattr(stage, "run_worker", None)
    row = {"model": "m", "backend": "eager", "status": "unstable", "p50_ms": 1.0}
    found = stage.measure_noise({}, [row], Bench(), 1, tmp_path)
    assert found == {"relative": None, "shapes": [], "reason": "no row is stable"}
    assert describe_noise(found) == "noise unknown (no row is stable): rows are not ranked"


def test_a_terminal_shows_each_reason_once():
    def row(length, status, reason):
        return {"model": "m", "backend": "eager", "batch_size": 1, "sequence_length": length, "lengths": "full",
                "status": status, "reason": reason}  # fmt: skip

    rows = [row(8, "unstable", "noise"), row(16, "ok", ""), row(32, "unstable", "noise"), row(8, "refused", "noise")]
    assert reasons(rows) == {
        "unstable: noise": ["m eager 1x8", "m eager 1x32"],
        "refused: noise": ["m eager 1x8"],
    }


def test_measurements_with_too_few_windows_have_no_speed():
    window = Window((0.1, 0.2), 0.9)
    row = describe(Measurement(False, "others used the CPU", (window, window), 4, 0.5), 2, 16, 16)
    assert row["status"] == "unstable"
    assert not {"p50_ms", "samples_per_s", "real_tokens_per_s"} & set(row)
    row = describe(Measurement(False, "noise", (Window((9.0,), 0.9), window, window, window), 0, 0.9), 2, 16, 16)
    assert (row["status"], row["reason"]) == ("unstable", "noise")
    assert row["p50_ms"] == pytest.approx(150.0)
    row = describe(Measurement(True, "", (window, window, window), 1, 0.9), 2, 12, 16)
    assert row["samples_per_s"] == pytest.approx(2 / 0.15)
    assert row["real_tokens_per_s"] == pytest.approx(12 / 0.15)
    assert row["padded_tokens_per_s"] == pytest.approx(16 / 0.15)
    assert row["padding"] == pytest.approx(0.25)
    assert row["p50_ms"] == pytest.approx(150.0)


@pytest.mark.parametrize(
    ("calls", "p90_ms", "p99_ms"),
    [(9, None, None), (18, None, None), (21, 1.0, None), (99, 1.0, None), (102, 1.0, 1.0)],
)
def test_percentiles_need_calls_beyond_them(calls, p90_ms, p99_ms):
    window = Window((0.001,) * (calls // 3), 0.9)
    row = describe(Measurement(True, "", (window, window, window), 0, 0.9), 1, 8, 8)
    assert (row["calls"], row["p50_ms"]) == (calls, pytest.approx(1.0))
    for key, expected in (("p90_ms", p90_ms), ("p99_ms", p99_ms)):
        assert row[key] is None if expected is None else row[key] == pytest.approx(expected), key


def test_lengths_beyond_the_models_are_refused(model_folder, tmp_path):
    recipe = make_recipe(tmp_path, model_folder("bert"), sequence_lengths=[80])
    with pytest.raises(UserError, match="at most 72, what m takes"):
        stage.prepare_subject(recipe, recipe.bench, "m", model_folder("bert"), tmp_path)


def test_generating_needs_room(model_folder, tmp_path):
    recipe = make_recipe(tmp_path, model_folder("gpt2"), decode={"prompt_lengths": [8, 60], "new_tokens": 13})
    with pytest.raises(UserError, match="bench.decode takes 73\nNeeded: at most 72, what m takes"):
        stage.prepare_subject(recipe, recipe.bench, "m", model_folder("gpt2"), tmp_path)
    recipe = make_recipe(tmp_path, model_folder("gpt2"), load={"p99_limit_ms": 1, "new_tokens": 57})
    with pytest.raises(UserError, match="bench.load takes sequence_lengths and new_tokens, 73"):
        stage.prepare_subject(recipe, recipe.bench, "m", model_folder("gpt2"), tmp_path)


def test_only_models_with_a_cache_generate(model_folder):
    settings = Bench(batch_sizes=(1, 2), decode={"prompt_lengths": [4, 8]})
    assert prompts_of(settings, read_spec(model_folder("gpt2"))) == [(1, 4), (2, 4), (1, 8), (2, 8)]
    assert prompts_of(settings, read_spec(model_folder("bert"))) == []
    roomy = Bench(batch_sizes=(1,), sequence_lengths=(8, 56, 57), decode={"new_tokens": 16})  # 72 in all
    assert prompts_of(roomy, read_spec(model_folder("gpt2"))) == [(1, 8), (1, 56)]
    assert prompts_of(Bench(decode=None), read_spec(model_folder("gpt2"))) == []


def test_generating_is_measured_by_its_first_token_and_by_all(raw_graph, model_folder, documents):
    spec = read_spec(model_folder("gpt2"))
    prompts = prompt_arrays(documents, spec, [(2, 6)])["prompts0"]
    assert prompts.shape == (2, 6)
    settings = Settings(threads=1, window_s=0.005, max_windows=5, stability=0.99)
    runner = open_onnx(raw_graph("gpt2"), 1)
    row = measure_decode(runner, model_folder("gpt2"), prompts, 9, settings, SystemClock())
    assert row["status"] in ("ok", "unstable") and row["peak_memory_mib"] > 10
    if row["status"] == "ok":
        whole_s = row["first_token_ms"] / 1e3 + 8 * row["token_ms"] / 1e3
        assert row["tokens_per_s"] == pytest.approx(2 * 9 / whole_s)


@pytest.mark.parametrize(("queued_s", "told"), [(0.0, True), (0.1, True), (0.5, False)])
def test_a_start_while_others_had_the_cpu_has_no_time(queued_s, told, raw_graph, model_folder, monkeypatch):
    """The process ran for a second meanwhile, and waited for a CPU for `queued_s`."""
    scheduled = iter([(3.0, 1.0), (4.0, 1.0 + queued_s)])
    monkeypatch.setattr(bench_worker, "scheduled_s", lambda process: next(scheduled))
    settings = Settings(threads=1, window_s=0.01, max_windows=3, stability=0.1)
    job = bench_worker.Job(str(raw_graph("bert").parent), "onnx_fp32", 1, 0, None, settings, "", "CPUExecutionProvider",
                           audited=False, prompts=0, new_tokens=0, cuda_graphs=False)  # fmt: skip
    inputs = read_spec(model_folder("bert")).pad([np.arange(5, 12)], 7)
    runner, cold_start_s = bench_worker.open_cold(job, inputs)
    assert runner.run(inputs)["logits"].shape[:2] == (1, 7)
    assert (cold_start_s is not None and cold_start_s > 0) if told else cold_start_s is None


def test_times_of_generating_by_hand():
    def measured(call_s, stable=True):
        window = Window((call_s,) * 3, 0.9)
        return Measurement(stable, "" if stable else "noise", (window, window, window), 0, 0.9)

    row = describe_decode(measured(0.010), measured(0.040), batch_size=4, new_tokens=16)
    assert (row["status"], row["first_token_ms"], row["token_ms"]) == ("ok", pytest.approx(10), pytest.approx(2))
    assert row["tokens_per_s"] == pytest.approx(4 * 16 / 0.04)
    row = describe_decode(measured(0.010), measured(0.040, stable=False), 4, 16)
    assert (row["status"], row["reason"]) == ("unstable", "noise")
    contended = Measurement(False, "others used the CPU", (), 4, 0.3)
    row = describe_decode(contended, measured(0.040), 4, 16)
    assert row == {"status": "unstable", "reason": "others used the CPU", "cpu_share": 0.3}


def test_speed_rows_are_full_of_text(documents, model_folder):
    spec = read_spec(model_folder("bert"))
    arrays = speed_arrays(documents, spec, [Cell(2, 8), Cell(3, 40)], seed=0)
    assert arrays["cell1|attention_mask"].sum() == 120
    text = np.concatenate(documents)
    assert arrays["cell1|input_ids"].ravel().tolist() == np.resize(text, 120).tolist()


def test_real_rows_are_documents_cut_and_padded_to_the_longest(documents, model_folder):
    spec = read_spec(model_folder("bert"))
    lengths = sorted(min(len(document), 60) for document in documents)
    assert lengths[0] < lengths[-1]
    arrays = speed_arrays(documents, spec, [Cell(3, 60, "real"), Cell(5, 9999, "real")], seed=1)
    rows = {tuple(row[:length]) for row, length in zip(
        arrays["cell0|input_ids"].tolist(), arrays["cell0|attention_mask"].sum(axis=1), strict=True)}  # fmt: skip
    assert rows == {tuple(document[:60].tolist()) for document in documents}  # each once, as there are as many
    assert arrays["cell0|input_ids"].shape == (3, lengths[-1])
    assert arrays["cell1|attention_mask"].shape[1] == max(map(len, documents))


def test_the_grid_has_no_real_batch_of_one():
    settings = Bench(batch_sizes=(1, 4), sequence_lengths=(16, 8), lengths=("full", "real"))
    assert grid(settings) == [Cell(1, 8), Cell(1, 16), Cell(4, 8), Cell(4, 8, "real"), Cell(4, 16),
                              Cell(4, 16, "real")]  # fmt: skip


def test_masks_are_deterministic_and_spare_special_tokens(documents, model_folder):
    folder = model_folder("bert")
    spec, tokenizer = read_spec(folder), build_tokenizer()
    marked = [np.concatenate([[2], document, [3]]) for document in documents]
    first, second = (quality_batches(marked, spec, folder, 16, 50, seed=4) for _ in range(2))
    assert all((a[key] == b[key]).all() for a, b in zip(first, second, strict=True) for key in a)
    other = quality_batches(marked, spec, folder, 16, 50, seed=5)
    assert any((a["labels"] != b["labels"]).any() for a, b in zip(first, other, strict=True))
    for batch in first:
        target = batch["labels"] >= 0
        assert (batch["input_ids"][target] == tokenizer.mask_token_id).all()
        assert not np.isin(batch["labels"][target], tokenizer.all_special_ids).any()
        assert not (target & (batch["attention_mask"] == 0)).any()
        lengths = batch["attention_mask"].sum(axis=1)
        assert (target.sum(axis=1) == np.maximum(1, np.round(0.15 * lengths))).all()


def test_quality_is_judged_on_many_documents(model_folder):
    """Not on the many pieces of the first one; what is left over of a document may be too short."""
    long, short = np.full(1000, 5), np.full(20, 6)
    (batch,) = quality_batches([long, *[short] * 5], read_spec(model_folder("gpt2")), Path(), 16, 8, seed=0)
    assert batch["input_ids"][:, 0].tolist() == [5, 6, 6, 6, 6, 6, 5, 5]


def test_perplexity_is_that_of_the_models_own_loss(documents, model_folder):
    folder = model_folder("gpt2")
    spec = read_spec(folder)
    batches = quality_batches(documents, spec, folder, 16, 50, seed=0)
    runner = open_torch(folder, 1)
    total, count = 0.0, 0
    for batch in batches:
        labels = np.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
        inputs = {key: torch.from_numpy(value) for key, value in batch.items()}
        with torch.no_grad():
            loss = runner.call.model(**inputs, labels=torch.from_numpy(labels)).loss.item()
        targets = int((labels[:, 1:] >= 0).sum())
        total, count = total + loss * targets, count + targets
    assert score(runner, batches, "perplexity").value == pytest.approx(np.exp(total / count), rel=1e-5)


def test_masked_accuracy_counts_hits():
    logits = np.zeros((1, 3, 4), dtype=np.float32)
    logits[0, 0, 2] = logits[0, 1, 1] = logits[0, 2, 3] = 1.0

    class Fixed:
        def run(self, inputs):
            return {"logits": logits}

    batch = {"input_ids": np.zeros((1, 3), dtype=int), "labels": np.array([[2, 0, -100]])}
    assert score(Fixed(), [batch, batch], "masked_accuracy").value == 0.5


def test_compiled_models_must_agree_with_eager(model_folder):
    spec = read_spec(model_folder("bert"))
    cell = spec.pad([np.arange(5, 20)], 15)
    one, other = open_torch(model_folder("bert"), 1), open_torch(model_folder("bert", 1), 1)
    check_compiled(one, one, [cell])
    with pytest.raises(UserError, match="compiled logits differs"):
        check_compiled(other, one, [cell])


def test_peak_memory_is_of_its_row():
    reset_peak_memory()
    base = peak_memory_mib()
    if base is None:
        pytest.skip("this system does not tell peak memory")
    block = np.ones(64 * 2**20 // 8)
    assert peak_memory_mib() > base + 50
    del block
    reset_peak_memory()
    assert peak_memory_mib() < base + 50

"""The loader of engines: those that were built for another place are built anew by TensorRT-RTX, or refused with both
reasons; numbers are held against the graph wherever there is a GPU, for which ONNX Runtime stands in here."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import numpy_helper

from export import bench, bench_table, bench_worker, prompts, rebuild, runners
from export.audit import audit, read_layers
from export.engine_files import Place, check_place, manifest_of, plan_name, read_manifest, write_manifest
from export.io_spec import read_spec
from export.rebuild import fitting_plan, open_fitting, origin_of
from export.to_tensorrt import Builder, engine_shapes, products
from tests.export.onnx_engine import runner_of
from trainer.artifact import add_evidence, hash_file, read_artifact, write_artifact, write_json
from trainer.errors import GateFailed, UserError
from trainer.export_config import Bench
from trainer.serving_config import Profile, TensorRT

SETTINGS = TensorRT(
    library="tensorrt_rtx",
    profiles=(Profile(batch_size=(1, 2, 4), sequence_length=(1, 16, 32)),),
)
THERE = Place("tensorrt_rtx", "1.6.1.0", "8.0", "NVIDIA A100", "550.0")
HERE = replace(THERE, library_version="1.7.1.116", compute_capability="8.9", gpu="NVIDIA L40S")
RUN_BY = {"gpus": lambda: [{"name": "NVIDIA L40S", "compute_capability": "8.9"}]}


@pytest.fixture
def exported(tmp_path, exported_folder) -> Path:
    """A run folder's export, with an engine folder of another place; what is in the plan matters to nobody here."""
    folder, engines = tmp_path / "export" / "bert", tmp_path / "tensorrt" / "bert"
    shutil.copytree(exported_folder("bert"), folder)
    engines.mkdir(parents=True)
    path = engines / plan_name("fp32", "8.0")
    path.write_bytes(b"an engine" * 100)
    about = {
        "variant": "fp32",
        "profiles": engine_shapes(read_spec(folder), SETTINGS),
        "tf32": False,
        "version_compatible": False,
        "hardware_compatibility": "none",
        "audit": {"wider_share": 0.0},
    }
    write_manifest(path, THERE, folder / "model.onnx", about)
    write_artifact(
        engines,
        "engines",
        recipe_sha256="",
        parents={"onnx": read_artifact(folder)["content_sha256"]},
        evidence=[{"what": "audit_fp32_8.0", "file": path.name, "sha256": hash_file(path), "metrics": {}}],
        about={"library": "tensorrt_rtx", "library_version": THERE.library_version},
    )
    return folder


@pytest.fixture
def plan(exported) -> Path:
    return exported.parents[1] / "tensorrt" / "bert" / plan_name("fp32", "8.0")


def fit(exported, here, variant="fp32"):
    return fitting_plan(origin_of(exported, variant), here)


def runs_as(monkeypatch, graph):
    """From now on a GPU is here, on which every plan computes what `graph` does; gives the plans that were opened."""
    opened = []

    def open_engine(plan, spec, onnx=None, cuda_graphs=False):
        opened.append(plan)
        return runner_of(graph, spec, read_manifest(plan)["profiles"])

    monkeypatch.setattr(rebuild, "gpus", RUN_BY["gpus"])
    monkeypatch.setattr(rebuild, "open_engine", open_engine)
    return opened


def moved(graph: Path, target: Path) -> Path:
    """The graph with one matrix changed by a hundredth."""
    model = onnx.load(graph)
    weight = next(one for one in model.graph.initializer if len(one.dims) == 2 and one.name.startswith("val"))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    onnx.save(model, target)
    return target


def test_an_engine_that_fits_is_itself(exported, plan):
    found = fit(exported, THERE)
    assert (found.plan, found.parity, found.instead) == (plan, None, "")  # no GPU has told its numbers
    assert [path.name for path in plan.parents[1].iterdir()] == ["bert"]


def test_one_that_was_never_run_is_held_against_its_graph_once(exported, plan, monkeypatch):
    opened = runs_as(monkeypatch, exported / "model.onnx")
    found = fit(exported, THERE)
    assert found.parity["max_abs"] < 1e-5 and found.parity["cases"] > 3 and opened == [plan]
    (_, proof) = read_artifact(plan.parent, "engines")["evidence"]
    assert proof["what"] == "parity_fp32_8.0" and proof["sha256"] == hash_file(plan)
    assert fit(exported, THERE).parity == proof["metrics"] and opened == [plan]
    add_evidence(plan.parent, proof | {"sha256": "0" * 64})  # of other bytes
    fit(exported, THERE)
    assert opened == [plan, plan]


def test_other_numbers_are_a_missed_gate(exported, plan, monkeypatch, tmp_path):
    runs_as(monkeypatch, moved(exported / "model.onnx", tmp_path / "moved.onnx"))
    with pytest.raises(GateFailed, match=r"model_fp32_sm80.plan: case .*\nNeeded: relative_rms at most 1e-05"):
        fit(exported, THERE)
    assert len(read_artifact(plan.parent, "engines")["evidence"]) == 1


def test_one_of_another_place_is_built_anew(exported, plan, capsys):
    """Once: the next call finds it. The engine is read back as the library tells it, and its shapes are the first's."""
    library = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install '.[rtx]'")
    here, graph = replace(HERE, library_version=library.__version__), exported / "model.onnx"
    found = fit(exported, here)
    said = capsys.readouterr().err
    assert "for compute capability 8.0, this GPU (NVIDIA L40S) has 8.9" in said and "was built by" in said
    assert "its layers have been read back, no GPU is here to compare its numbers" in said
    assert found.parity is None and "has 8.9" in found.instead
    manifest, before = read_manifest(found.plan), read_manifest(plan)
    check_place(found.plan, manifest, here, graph)
    assert manifest["profiles"] == before["profiles"] and manifest["onnx"] == before["onnx"]
    assert manifest["in_place_of"] == before["plan"] and manifest["audit"]["types"] == {"fp32": 14}
    builder = Builder("tensorrt_rtx")
    direct, description = builder.build_shapes(graph, before["profiles"], SETTINGS, "8.9")
    assert abs(found.plan.stat().st_size - len(direct)) < 0.02 * len(direct)
    assert audit("bert", "fp32", read_layers(description), products(graph), 0.0) == manifest["audit"]
    stamp = found.plan.stat().st_mtime_ns
    assert fit(exported, here) == found and found.plan.stat().st_mtime_ns == stamp
    assert capsys.readouterr().err == ""


def test_two_that_find_none_build_one(exported, monkeypatch, capsys):
    library = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install '.[rtx]'")
    here, built, build = replace(HERE, library_version=library.__version__), [], rebuild._build

    def slow(*words):
        built.append(words)
        time.sleep(1.0)
        return build(*words)

    monkeypatch.setattr(rebuild, "_build", slow)
    with ThreadPoolExecutor(2) as pool:
        (one, other) = pool.map(lambda _: fit(exported, here), range(2))
    assert one == other and len(built) == 1
    assert capsys.readouterr().err.count("waiting for another lmworks, which is building in place of an engine in") == 1


def test_where_a_gpu_is_its_numbers_are_compared_before_it_is_there(exported, plan, monkeypatch, tmp_path, capsys):
    library = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install '.[rtx]'")
    here = replace(HERE, library_version=library.__version__)
    runs_as(monkeypatch, moved(exported / "model.onnx", tmp_path / "moved.onnx"))
    with pytest.raises(GateFailed, match=r"has 8.9; and none is built in its place: model_fp32_sm89.plan: case "):
        fit(exported, here)
    assert [*plan.parents[1].rglob("*.plan")] == [plan]
    opened = runs_as(monkeypatch, exported / "model.onnx")
    found = fit(exported, here)
    assert "read back, it gives its graph's numbers" in capsys.readouterr().err
    assert found.parity["max_abs"] < 1e-5 and read_manifest(found.plan)["parity"] == found.parity
    assert fit(exported, here) == found and len(opened) == 1
    monkeypatch.setattr(rebuild, "this_place", lambda *words: here)
    feeds = read_spec(exported).pad([[5, 6, 7]], 3)
    assert open_fitting(exported, "fp32").run(feeds)["logits"].shape == (1, 3, 300) and opened[1:] == [found.plan]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"compute_capability": None, "gpu": None}, "here is no GPU to build for"),
        ({"library": "tensorrt", "library_version": "10.13.0"}, "it is to be built by tensorrt_rtx"),
    ],
)
def test_where_none_can_be_built_both_reasons_are_told(exported, change, reason):
    with pytest.raises(UserError, match=rf"sm80.plan cannot run here: .*; and none is built in its place: {reason}"):
        fit(exported, replace(HERE, **change))


def test_only_the_graph_that_passed_parity_is_built(exported, plan):
    graph, whole = exported / "model.onnx", (exported / "model.onnx").read_bytes()
    graph.write_bytes(whole + b"?")
    with pytest.raises(UserError, match=r"for compute capability 8.0.*model.onnx is not the file that passed parity"):
        fit(exported, HERE)
    graph.unlink()
    with pytest.raises(UserError, match=r"none is built in its place: .*model.onnx is not there"):
        fit(exported, HERE)
    graph.write_bytes(whole)
    with pytest.raises(UserError, match=r"tensorrt/bert has no engine of int8"):
        fit(exported, HERE, "int8")
    with pytest.raises(UserError, match="has no verified fp16"):
        fit(exported, HERE, "fp16")
    record = read_artifact(exported)
    other = [proof | {"sha256": "0" * 64} for proof in record["evidence"]]
    write_json(exported / "artifact.json", record | {"evidence": other})
    with pytest.raises(UserError, match="sm80.plan was built from another model.onnx"):
        fit(exported, HERE)
    manifest_of(plan).write_text(json.dumps(read_manifest(plan) | {"plan": {"bytes": 900, "sha256": "0" * 64}}))
    with pytest.raises(UserError, match="is not the plan that its manifest names"):
        fit(exported, HERE)


def test_a_library_that_refuses_says_so_and_leaves_nothing(exported, plan):
    library = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install '.[rtx]'")
    here = replace(HERE, library_version=library.__version__, compute_capability="9.0", gpu="NVIDIA H100")
    with pytest.raises(
        UserError, match=r"has 9.0; and none is built in its place: tensorrt_rtx .* does not build for 9"
    ):
        fit(exported, here)
    assert [path.name for path in plan.parents[1].iterdir()] == ["bert"]


def test_the_benchmark_and_generate_open_engines_by_the_same_loader(exported, plan, model_folder, tmp_path):
    """On a machine without a GPU: refused with both reasons, in the report's row and to the one who asked for text."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install '.[rtx]'")
    if rebuild.gpus():
        pytest.skip("a GPU is here")
    both = r"sm80.plan cannot run here: .*here is no GPU; and none is built in its place: here is no GPU to build for"
    spec = read_spec(exported)
    subject = bench.Subject("bert", model_folder("bert"), exported, spec, tmp_path / "none.npz", 0, 0)
    settings = Bench(backends=("tensorrt_fp32",), provider="CUDAExecutionProvider", batch_sizes=(1,))
    (row, _) = bench.measure_backend(subject, "tensorrt_fp32", settings, 1, tmp_path)["rows"]
    assert row["status"] == "refused"
    with pytest.raises(UserError, match=both):
        raise UserError(row["reason"])
    with pytest.raises(UserError, match=both):
        prompts.open_writer(plan.parent)
    with pytest.raises(UserError, match="no engines of int8\nNeeded: one of fp32, fp16"):
        prompts.open_writer(plan.parent, "int8")
    (exported / "model.onnx").write_bytes(b"another")
    (row, _) = bench.measure_backend(subject, "tensorrt_fp32", settings, 1, tmp_path)["rows"]
    assert row["reason"] == "model.onnx is not the file that passed parity"


def test_a_recorded_engine_and_a_recorded_compiled_model_are_asked_for_by_one_key(model_folder, monkeypatch, tmp_path):
    """The benchmark's job hands it to the engine's opener, and to torch.compile on a GPU alone."""
    with pytest.raises(ValueError, match="cuda_graphs are a GPU's: set provider to one, or leave it out"):
        Bench(cuda_graphs=True)
    settings = Bench(cuda_graphs=True, provider="CUDAExecutionProvider", backends=("compile", "tensorrt_fp32"))
    spec = read_spec(model_folder("bert"))
    subject = bench.Subject("m", tmp_path, tmp_path, spec, tmp_path / "none.npz", 0, 0)
    job = bench.job_of(subject, "tensorrt_fp32", settings, 1)
    assert job.prompts == len(bench.prompts_of(settings, spec))
    pair = replace(subject, spec=replace(spec, encoder=spec, cache=read_spec(model_folder("gpt2")).cache))
    assert bench.prompts_of(settings, pair.spec) and bench.job_of(pair, "tensorrt_fp32", settings, 1).prompts == 0
    seen = []
    monkeypatch.setattr(rebuild, "open_fitting", lambda *given: seen.append(given) or SimpleNamespace(run=len))
    bench_worker.open_cold(job, {})
    assert seen == [(tmp_path, "fp32", True)]
    monkeypatch.setattr(torch, "compile", lambda module, **options: seen.append(options))
    for device in ("cpu", "meta"):
        runners.torch_runner(torch.nn.Linear(1, 1), spec, True, device, cuda_graphs=True)
    assert [one["mode"] for one in seen[1:]] == ["default", "reduce-overhead"]


def test_a_terminal_tells_how_long_an_engine_was_built(capsys):
    engine = {"plan": "/x/model_fp16_sm89.plan", "file_mib": 12.34, "instead": ""}
    row = {"model": "m", "backend": "tensorrt_fp16", "batch_size": 1, "sequence_length": 8, "lengths": "full",
           "status": "ok", "engines": [engine | {"build_s": 3.21}]}  # fmt: skip
    noise = {"relative": None, "reason": "no row is stable"}
    report = {"rows": [row, row], "machine": {"cpu": "c", "threads": 1}, "noise": noise, "quality": [], "decode": [],
              "load": [], "no_energy": []}  # fmt: skip
    bench_table.show(report)
    said = capsys.readouterr().out
    assert said.count("m tensorrt_fp16: model_fp16_sm89.plan of 12.3 MiB, built in 3.2 s\n") == 1


def test_engines_are_measured_beside_what_runs_on_a_gpu():
    with pytest.raises(ValueError, match="engines run on a GPU, and are compared with what does: set provider"):
        Bench(backends=("onnx_fp32", "tensorrt_fp32"))

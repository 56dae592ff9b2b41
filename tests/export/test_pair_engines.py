"""Engines of encoder-decoders, by TensorRT-RTX without a GPU: both graphs, profiles with free batch, text and past,
layers read back, manifests that name both, and the proof that runs where a GPU is."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export import bench, bench_worker, rebuild, to_tensorrt
from export.audit import audit, read_layers
from export.bench_inputs import quality_batches
from export.engine_files import check_together, manifest_of, read_manifest, write_manifest
from export.files import hashes
from export.gates import Gates, TaskGate
from export.generate import Sampling, generate
from export.io_spec import read_spec
from export.precision import lower
from export.rebuild import fitting_plans, open_fitting
from export.runners import Pair, open_onnx, open_onnx_graphs
from export.scores import score
from export.tensorrt_runner import open_engine
from export.to_onnx import export_graph, load_model
from export.to_tensorrt import build_engines, engine_shapes, products, profile_shapes, prove
from export.variants import make_variant
from export.verified import Verified, examine
from tests.export.conftest import MAX_LENGTH, PAIR_GATES
from tests.export.onnx_engine import runner_of
from tests.export.test_tensorrt import HERE, SETTINGS, assert_profiles_are_in_the_engine
from trainer.artifact import hash_file, read_artifact
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError
from trainer.export_config import Bench, Calibration, Export

STEMS = ("encoder_model", "decoder_with_past_model")


@pytest.fixture
def recipe(exported_pair, trained_pair, tmp_path):
    """A recipe whose export of a t5 is done elsewhere."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "t5").symlink_to(exported_pair("t5"))
    export = PAIR_GATES | {"models": {"t5": str(trained_pair("t5"))}}
    section = SETTINGS.model_copy(update={"compute_capabilities": ("8.9",)})
    return Recipe.model_validate({"run_dir": tmp_path, "export": export, "tensorrt": section.model_dump()})


def test_a_step_takes_one_token_and_the_text_has_its_own_axis(model_folder):
    spec = read_spec(model_folder("t5"))
    (_, profile) = SETTINGS.profiles  # batches 1 to 8, texts of 2 to 32 tokens, pasts of 0 to 32
    ports = {port.name: profile_shapes(port, spec, profile) for port in spec.inputs}
    assert ports["input_ids"] == ((1, 1), (4, 1), (8, 1))
    assert ports["encoder_attention_mask"] == ((1, 2), (4, 16), (8, 32))
    assert ports["past_key_values.0.decoder.key"] == ((1, 3, 0, 8), (4, 3, 16, 8), (8, 3, 32, 8))
    assert ports["past_key_values.1.encoder.value"] == ((1, 3, 2, 8), (4, 3, 16, 8), (8, 3, 32, 8))
    (tokens, _) = spec.encoder.inputs
    assert profile_shapes(tokens, spec.encoder, SETTINGS.profiles[0]) == ((1, 1), (1, 16), (1, MAX_LENGTH))


def test_the_stage_leaves_both_plans_each_of_which_names_the_other(recipe, builder, exported_pair, capsys):
    """The dynamically quantized int8 is no graph for TensorRT: said, and left out."""
    to_tensorrt.run(recipe)
    said = capsys.readouterr().out
    assert "t5 int8: no engine: " in said and "t5 fp32 for 8.9 (encoder_model): " in said
    folder = recipe.stage_dir("tensorrt") / "t5"
    plans = [folder / f"{stem}_fp32_sm89.plan" for stem in STEMS]
    assert {path.name for path in folder.glob("*.plan")} == {plan.name for plan in plans}
    evidence = read_artifact(folder, "engines")["evidence"]
    assert [(entry["what"], entry["file"]) for entry in evidence] == [
        ("encoder_audit_fp32_8.9", plans[0].name), ("audit_fp32_8.9", plans[1].name)
    ]  # fmt: skip
    for plan, other, stem in zip(plans, plans[::-1], STEMS, strict=True):
        manifest = read_manifest(plan)
        assert manifest["onnx"] == hashes(exported_pair("t5") / f"{stem}.onnx")
        assert manifest["beside"] == [hashes(other)] and manifest["stem"] == stem
        assert set(manifest["audit"]["types"]) == {"fp32"} and manifest["audit"]["matrix_layers"] > 20
    assert read_manifest(plans[1])["profiles"][1]["past_key_values.0.decoder.key"][2] == [8, 3, 32, 8]
    check_together(plans)
    plans[0].write_bytes(plans[0].read_bytes() + b"?")
    write_manifest(plans[0], HERE, exported_pair("t5") / "encoder_model.onnx", {"beside": [hashes(plans[1])]})
    with pytest.raises(UserError, match="decoder_with_past_model_fp32_sm89.plan was not built with this encoder_model"):
        check_together(plans)
    with pytest.raises(UserError, match="decoder_with_past_model_fp32_sm89.plan was not built with this encoder_model"):
        fitting_plans(recipe.stage_dir("export") / "t5", "fp32", HERE)


@pytest.fixture
def place(builder, monkeypatch):
    """The GPU that is said to be here; ONNX Runtime stands in for it."""
    here = replace(builder.place, compute_capability="8.9", gpu="NVIDIA L40S", driver="580.0")
    monkeypatch.setattr(rebuild, "this_place", lambda name, library: here)
    monkeypatch.setattr(rebuild, "gpus", lambda: [{"name": here.gpu, "compute_capability": "8.9"}])
    return here


def runs_as(monkeypatch, exported: Path, **instead: Path) -> None:
    """Plans compute what the graphs of `exported` do, or the files of `instead`, by stem."""

    def open_engine(plan, spec, onnx=None, cuda_graphs=False):
        graph = instead.get(spec.stem, exported / spec.file("fp32"))
        return runner_of(graph, spec, read_manifest(plan)["profiles"])

    monkeypatch.setattr(rebuild, "open_engine", open_engine)


def test_the_loader_opens_both_which_write_their_graphs_text(recipe, place, pieces, monkeypatch):
    """Each held against its own graph first, once; the decoder's steps are of one token, also where many are given."""
    to_tensorrt.run(recipe)
    exported = recipe.stage_dir("export") / "t5"
    runs_as(monkeypatch, exported)
    opened, spec = open_fitting(exported, "fp32"), read_spec(exported)
    evidence = read_artifact(recipe.stage_dir("tensorrt") / "t5", "engines")["evidence"]
    found = {entry["what"]: entry["metrics"] for entry in evidence if "parity_" in entry["what"]}
    assert set(found) == {"encoder_parity_fp32_8.9", "parity_fp32_8.9"}
    assert all(metrics["max_abs"] < 1e-4 and metrics["cases"] > 1 for metrics in found.values())
    assert [one.parity for one in fitting_plans(exported, "fp32", place)] == list(found.values())
    prompts, settings = [[7, 40, 41, 9], [30, 31]], Sampling(20)
    graphs = open_onnx_graphs([exported / file for file in spec.files("fp32")], spec, 1)
    assert isinstance(opened, Pair)
    assert generate(opened, spec, prompts, settings) == generate(graphs, spec, prompts, settings)
    batches = quality_batches(pieces, spec, exported, 32, 16, seed=0)
    ours, theirs = (score(one, batches, "perplexity") for one in (opened, graphs))
    np.testing.assert_allclose(ours.sums_R, theirs.sums_R, rtol=1e-4)


def test_the_benchmark_has_rows_of_both_together(recipe, place, pieces, monkeypatch, tmp_path):
    """Speed, generating and quality, the decoder in steps of one token; the two processes that do it are this one."""
    to_tensorrt.run(recipe)
    runs_as(monkeypatch, recipe.stage_dir("export") / "t5")
    modules = {
        "export.rebuild": lambda exported, variant, path: rebuild.main(Path(exported), variant, Path(path)),
        "export.bench_worker": lambda path: bench_worker.main(Path(path)),
    }

    def run_module(name, threads, *words):
        modules[name](*words)
        return ""

    monkeypatch.setattr(bench, "_run_module", run_module)
    monkeypatch.setattr(bench, "load_documents", lambda recipe, model: pieces)
    section = {"backends": ["tensorrt_fp32"], "provider": "CUDAExecutionProvider", "batch_sizes": [2],
               "sequence_lengths": [16], "threads": 1, "window_s": 0.01, "max_windows": 3, "stability": 0.99,
               "quality_sequences": 16}  # fmt: skip
    settings = Bench.model_validate(section)
    subject = bench.prepare_subject(recipe, settings, "t5", recipe.exported_models()["t5"], tmp_path)
    found = bench.measure_backend(subject, "tensorrt_fp32", settings, 1, tmp_path)
    (row,), (decode,), (quality,) = found["rows"], found["decode"], found["quality"]
    assert row["status"] in ("ok", "unstable") and decode["status"] in ("ok", "unstable")
    assert [Path(engine["plan"]).name for engine in row["engines"]] == [f"{stem}_fp32_sm89.plan" for stem in STEMS]
    assert all(engine["parity"]["max_abs"] < 1e-4 for engine in row["engines"])
    assert row["file_mib"] == sum(engine["file_mib"] for engine in row["engines"])
    spec, exported = subject.spec, subject.exported
    graphs = open_onnx_graphs([exported / file for file in spec.files("fp32")], spec, 1)
    batches = quality_batches(pieces, spec, exported, 16, 16, recipe.seed)
    assert quality["value"] == pytest.approx(score(graphs, batches, "perplexity").value, rel=1e-4)


@pytest.mark.parametrize("stem", STEMS)
def test_the_loader_finds_other_numbers_in_either(stem, recipe, place, monkeypatch, tmp_path):
    to_tensorrt.run(recipe)
    exported = recipe.stage_dir("export") / "t5"
    runs_as(monkeypatch, exported, **{stem: moved(exported / f"{stem}.onnx", tmp_path / "engine.onnx")})
    with pytest.raises(GateFailed, match=f"{stem}_fp32_sm89.plan: case "):
        open_fitting(exported, "fp32")


def test_both_are_built_anew_for_another_place(recipe, place, monkeypatch):
    """Each in a folder of its own: neither replaces the other."""
    to_tensorrt.run(recipe)
    exported, elsewhere = recipe.stage_dir("export") / "t5", replace(place, compute_capability="12.0")
    monkeypatch.setattr(rebuild, "gpus", list)
    found = fitting_plans(exported, "fp32", elsewhere)
    assert [one.plan.name for one in found] == [f"{stem}_fp32_sm120.plan" for stem in STEMS]
    assert all(one.plan.is_file() and "has 12.0" in one.instead for one in found)
    assert [read_manifest(one.plan)["stem"] for one in found] == list(STEMS)
    assert fitting_plans(exported, "fp32", elsewhere) == found
    with pytest.raises(UserError, match="here is no GPU to build for"):
        fitting_plans(exported, "fp32", replace(place, compute_capability=None, gpu=None))


def moved(graph: Path, target: Path) -> Path:
    """The graph with one matrix half as large again."""
    model = onnx.load(graph)
    weight = next(one for one in model.graph.initializer if len(one.dims) == 2)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.5), weight.name))
    onnx.save(model, target)
    return target


@pytest.mark.parametrize(
    ("name", "precision", "capability"),
    [
        ("bart", "fp16", "8.9"),
        pytest.param("mt5", "fp16", "8.0", marks=pytest.mark.slow),
        pytest.param("mt5", "bf16", "12.0", marks=pytest.mark.slow),
    ],
)
def test_both_graphs_in_16_bits_multiply_in_16_bits(
    name, precision, capability, builder, model_folder, documents, tmp_path
):
    """Also attention on a cache, which the layer reads in fp32 and casts itself; its mask stays in fp32 in fp16."""
    folder = model_folder(name)
    for part in read_spec(folder).parts:
        raw, graph = tmp_path / part.file("fp32"), tmp_path / part.file(precision)
        export_graph(load_model(folder, part), part, raw, 18)
        gates = Gates(folder, part, Export(quality=None), documents, lambda needed: documents, seed=0)
        make_variant(precision, raw, graph, lambda gates=gates: gates.calibration, Calibration())
        _, description = builder.build(graph, part, SETTINGS, capability)
        found = audit(name, precision, read_layers(description), products(graph), 0.0)
        assert found["types"] == {precision: found["matrix_layers"]}
        assert_profiles_are_in_the_engine(description, part)


def test_both_graphs_in_fp8_pass_their_gates_and_multiply_in_fp8(
    builder, exported_pair, trained_pair, pieces, tmp_path
):
    """Also what the encoder hands its decoder, which a product reads as it comes; and T5's Relu stays in the graph."""
    folder, exported = trained_pair("t5"), exported_pair("t5")
    spec, parity = read_spec(folder), PAIR_GATES["parity"] | {"fp8": PAIR_GATES["parity"]["int8"]}
    settings = Export.model_validate(PAIR_GATES | {"parity": parity, "variants": ["fp8"]})
    for part in spec.parts:
        gates = Gates(folder, part, settings, pieces, lambda needed: pieces, seed=0)
        graph = tmp_path / part.file("fp8")
        make_variant("fp8", exported / part.file("fp32"), graph, lambda gates=gates: gates.calibration, Calibration())
        (proof,) = gates.check("t5", "fp8", graph, open_onnx(graph, 1))
        assert proof["metrics"]["relative_rms"] > 0.005  # rounded, indeed
        _, description = builder.build(graph, part, SETTINGS, "8.9")
        found = audit("t5", "fp8", read_layers(description), products(graph), 0.0)
        assert found["types"] == {"fp8": found["matrix_layers"]}
    files = [tmp_path / part.file("fp8") for part in spec.parts]
    whole = TaskGate(folder, spec, settings, pieces, seed=0)
    assert len(whole.check("t5", "fp8", files, open_onnx_graphs(files, spec, 1))) == 1


def test_a_planted_fp32_block_in_the_decoder_fails_the_stage(recipe, builder, exported_pair, tmp_path):
    """The first feed-forward block, two products in each of two profiles, between casts."""
    folder = exported_pair("t5")
    subject = examine("t5", folder)
    files = [tmp_path / part.file("fp16") for part in subject.spec.parts]
    for file, part in zip(files, subject.spec.parts, strict=True):
        raw = folder / part.file("fp32")
        lower(raw, file, "fp16", feed_forward(raw) if part.encoder else set())
    planted = replace(subject, variants={"fp16": Verified("fp16", files[1], {}, files[0])})
    with pytest.raises(
        GateFailed, match=r"t5 fp16 for 8.9 \(decoder_with_past_model\): asked fp16, \d+% of .* run fp32"
    ):
        build_engines(recipe, recipe.tensorrt, builder, planted)
    assert not (recipe.stage_dir("tensorrt") / "t5").exists()


def feed_forward(graph: Path) -> set[str]:
    """The nodes of the first layer's feed-forward block."""
    nodes = onnx.load(graph).graph.node
    inside = [node for node in nodes if ".0.layer.2.DenseReluDense" in str(node.metadata_props)]
    assert sum(node.op_type == "MatMul" for node in inside) == 2
    return {node.name for node in inside}


def test_the_proof_runs_cases_that_a_profile_takes(recipe, exported_pair, trained_pair, pieces, monkeypatch, tmp_path):
    """Where an engine runs, it is held to the fp32 graph in steps of one token; here a graph stands for the engine."""
    engine_of = lambda plan, spec: runner_of(plan, spec, engine_shapes(spec, recipe.tensorrt))  # noqa: E731
    monkeypatch.setattr(to_tensorrt, "load_documents", lambda recipe, folder: pieces)
    monkeypatch.setattr(to_tensorrt, "open_engine", lambda plan, spec, graph: engine_of(plan, spec))
    subject = examine("t5", exported_pair("t5"))
    form = subject.variants["fp32"]
    for part, graph in zip(subject.spec.parts, form.files, strict=True):
        found = prove(recipe, "t5", subject, part, form, graph)
        assert found["metrics"]["max_abs"] < 1e-4
        told = {case["case"] for case in found["cases"]}
        if part.encoder:
            assert {"1x1 after 0 on 1", "1x1 after 20 on 13", "7x1 after 9 on 16"} <= told
            assert not [case for case in told if re.match(r"\d+x[2-9]", case)]
        else:
            assert {"1x1", f"1x{32}"} & told and "3x9" in told
    faulty = moved(form.file, tmp_path / "engine.onnx")
    with pytest.raises(GateFailed, match="t5: case "):
        prove(recipe, "t5", subject, subject.spec, form, faulty)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_two_engines_write_their_graphs_text(builder, exported_pair, tmp_path):
    own = builder.place.compute_capability
    if f"SM{own.replace('.', '')}" not in builder.library.ComputeCapability.__members__:
        pytest.skip(f"tensorrt_rtx {builder.place.library_version} does not build for {own}")
    folder = exported_pair("t5")
    spec, opened = read_spec(folder), []
    for part in spec.parts:
        plan = tmp_path / f"{part.stem}.plan"
        plan.write_bytes(builder.build(folder / part.file("fp32"), part, SETTINGS, own)[0])
        about = {"version_compatible": False, "hardware_compatibility": "none"}
        write_manifest(plan, builder.place, folder / part.file("fp32"), about)
        opened.append(open_engine(plan, part, folder / part.file("fp32")))
    prompts, settings = [[7, 40, 41, 9], [30, 31]], Sampling(20)
    graphs = open_onnx_graphs([folder / file for file in spec.files("fp32")], spec, 1)
    assert generate(Pair(*opened, spec), spec, prompts, settings) == generate(graphs, spec, prompts, settings)
    assert manifest_of(tmp_path / "encoder_model.plan").is_file() and hash_file(tmp_path / "encoder_model.plan")

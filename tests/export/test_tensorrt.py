"""Engines that TensorRT-RTX builds here without a GPU: every architecture, layers read back, and who may load them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers as hf
from onnx import TensorProto, helper, numpy_helper

from export import to_tensorrt
from export.audit import audit, read_layers
from export.calibration import calibration_batches
from export.engine_files import Place, check_place, manifest_of, plan_name, read_manifest, write_manifest
from export.export import export_model
from export.io_spec import BATCH, SEQUENCE, Port, read_spec
from export.runners import open_onnx
from export.tensorrt_library import load_library
from export.tensorrt_runner import open_engine
from export.to_tensorrt import (
    Builder,
    build_engines,
    choose_capabilities,
    products,
    profile_shapes,
)
from export.variants import make_variant
from export.verified import Verified, examine
from tests.export.conftest import CONFIGS, GATES, MAX_LENGTH, build_tokenizer
from trainer.artifact import hash_file, read_artifact
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError
from trainer.export_config import Calibration, Export
from trainer.serving_config import Profile, TensorRT

WIDE = {"vocab_size": 300, "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2,
        "intermediate_size": 256}  # fmt: skip
SETTINGS = TensorRT(
    library="tensorrt_rtx",
    profiles=(
        Profile(batch_size=(1, 1, 1), sequence_length=(1, 16, 512), past_length=(0, 16, 512)),
        Profile(batch_size=(1, 4, 8), sequence_length=(2, 16, 32), past_length=(0, 16, 32)),
    ),
)


@pytest.fixture(scope="session")
def graph_in(raw_graph, model_folder, documents, tmp_path_factory):
    """Gives a tiny model's graph in a form as the export makes it, int8 with the ranges that TensorRT takes."""
    root = tmp_path_factory.mktemp("forms")

    def give(form: str, name: str) -> Path:
        raw, path = raw_graph(name), root / f"{name}_{form}.onnx"
        if form == "fp32":
            return raw
        if not path.exists():
            batches = calibration_batches(lambda needed: documents, read_spec(model_folder(name)), Calibration())
            make_variant(form, raw, path, lambda: batches, Calibration(symmetric=True))
        return path

    return give


def widen(source: Path, target: Path, first: str, last: str) -> None:
    """Write an fp16 graph whose nodes from `first` to `last` compute in fp32, with casts at the edges of the block."""
    model = onnx.load(source)
    graph = model.graph
    names = [node.name for node in graph.node]
    block = graph.node[names.index(first) : names.index(last) + 1]
    halves = {one.name: one for one in graph.initializer if one.data_type == TensorProto.FLOAT16}
    nodes, wide = [], {output for node in block for output in node.output}
    for node in graph.node:
        for index, name in enumerate(node.input if node in block else ()):
            if name in halves and name not in wide:
                graph.initializer.append(
                    numpy_helper.from_array(numpy_helper.to_array(halves[name]).astype("f"), name + "_")
                )
            elif name not in wide:
                nodes.append(helper.make_node("Cast", [name], [name + "_"], to=TensorProto.FLOAT))
            wide.add(name)
            node.input[index] = name + "_"
        nodes.append(node)
        if node in block:
            (output,) = node.output
            node.output[0] = output + "_"
            nodes.append(helper.make_node("Cast", [output + "_"], [output], to=TensorProto.FLOAT16))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target)


def engines() -> list:
    """Each architecture in each precision. Mistral is Llama with another mask, Qwen2 with biases."""
    slow = {(form, name) for form in ("fp32", "fp16") for name in ("mistral", "qwen2")}
    slow |= {("bf16", name) for name in CONFIGS if name not in ("bert", "llama")}
    every = [(form, name) for form in ("fp32", "fp16", "bf16") for name in CONFIGS]
    return [pytest.param(*one, marks=pytest.mark.slow) if one in slow else one for one in every]


@pytest.mark.parametrize(("asked", "name"), engines())
def test_every_architecture_becomes_an_engine_of_the_asked_precision(asked, name, builder, graph_in, model_folder):
    graph, spec = graph_in(asked, name), read_spec(model_folder(name))
    plan, description = builder.build(graph, spec, SETTINGS, "8.9")
    assert len(plan) > 2**20
    found = audit(name, asked, read_layers(description), products(graph), 0.0)
    assert found["types"] == {asked: found["matrix_layers"]} and found["matrix_layers"] >= 2 * 2 * 4
    assert_profiles_are_in_the_engine(description, spec)


@pytest.mark.parametrize(
    ("name", "capability", "count"),
    [
        ("bert", "8.9", 2 * 6 + 2),
        pytest.param("bert", "12.0", 2 * 6 + 2, marks=pytest.mark.slow),
        pytest.param("gpt2", "8.0", 2 * 4 + 1, marks=pytest.mark.slow),
    ],
)
def test_calibrated_weights_are_multiplied_in_int8(name, capability, count, builder, graph_in, model_folder):
    """None is widened before its product, which the audit would take for one of two activations."""
    graph, spec = graph_in("int8_static", name), read_spec(model_folder(name))
    held = onnx.load(graph).graph
    stored = {one.name for one in held.initializer if one.data_type == TensorProto.INT8}
    widened = {node.output[0] for node in held.node if node.op_type == "DequantizeLinear" and node.input[0] in stored}
    weighed = {node.name for node in held.node if node.op_type == "MatMul" and node.input[1] in widened}
    assert len(weighed) == count
    _, description = builder.build(graph, spec, SETTINGS, capability)
    layers = read_layers(description)
    audit(name, "int8_static", layers, products(graph), 0.0)
    assert weighed <= {node for layer in layers if layer.is_product and layer.weights for node in layer.nodes}
    assert_profiles_are_in_the_engine(description, spec)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (hf.BertForMaskedLM, hf.BertConfig(**WIDE)),
        (hf.GPT2LMHeadModel, hf.GPT2Config(n_layer=2, n_embd=128, n_head=2, vocab_size=300)),
        (hf.LlamaForCausalLM, hf.LlamaConfig(**WIDE, num_key_value_heads=1)),
        (hf.T5ForConditionalGeneration, hf.T5Config(d_model=128, num_heads=2, d_ff=256, num_layers=2, vocab_size=300)),
    ],
)
def test_attention_is_one_layer_of_an_engine(kind, config, builder, documents, tmp_path):
    """Scores, softmax and their product with values, with heads as wide as users' models have them, 64."""
    kind(config).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    gates = GATES["parity"] | {"fp16": {"min_top1": 0.0}}
    settings = Export.model_validate(GATES | {"variants": ["fp16"], "parity": gates})
    folder = export_model(Recipe(run_dir=tmp_path), settings, "m", tmp_path / "model", documents)
    for part in read_spec(tmp_path / "model").parts:
        graph = folder / f"{part.stem}_fp16.onnx"
        _, description = builder.build(graph, part, SETTINGS, "8.9")
        layers = read_layers(description)
        attention = [layer for layer in layers if "mha" in layer.name]
        assert len(attention) == (4 if part.encoder else 2) * len(SETTINGS.profiles)
        assert set(audit("m", "fp16", layers, products(graph), 0.0)["types"]) == {"fp16"}
        read = [one.type for layer in attention for one in layer.inputs]
        assert "fp32" in read or "bool" in read  # what is added to scores, or chooses them, tells no factor's type
        wide = [replace(layer, inputs=tuple(replace(one, type="fp32") if one.type == "fp16" else one
                                            for one in layer.inputs)) for layer in attention]  # fmt: skip
        with pytest.raises(GateFailed, match="m: asked fp16, 100% of matrix layers run fp32, such as _ge.._mha"):
            audit("m", "fp16", wide, [], 0.0)


def assert_profiles_are_in_the_engine(description, spec):
    """The engine's own words on its inputs, against the shapes that the recipe asks for."""
    for port in spec.inputs:
        (line,) = re.findall(rf"^ *Name: {re.escape(port.name)}, IOMode: Input.*", description, re.M)
        told = re.findall(r"MinShape: \[([\d,]+)\], OptShape: \[([\d,]+)\], MaxShape: \[([\d,]+)\]", line)
        asked = [profile_shapes(port, spec, profile) for profile in SETTINGS.profiles]
        assert [tuple(tuple(map(int, one.split(","))) for one in shapes) for shapes in told] == asked


def test_a_planted_fp32_layer_fails_the_audit(builder, graph_in, model_folder, tmp_path):
    """The feed-forward block of one layer, two products in each of two profiles. (A single product between two casts
    would not do: TensorRT-RTX takes the casts into it, and multiplies in fp16.)"""
    graph = tmp_path / "planted.onnx"
    widen(graph_in("fp16", "bert"), graph, "node_MatMul_113", "node_MatMul_115")
    _, description = builder.build(graph, read_spec(model_folder("bert")), SETTINGS, "8.9")
    layers = read_layers(description)
    with pytest.raises(GateFailed, match=r"bert: asked fp16, 14% of matrix layers run fp32, such as .*\n.*at most 0%"):
        audit("bert", "fp16", layers, products(graph), 0.0)
    assert audit("bert", "fp16", layers, products(graph), 0.15)["types"] == {"fp16": 24, "fp32": 4}


def test_an_fp32_graph_is_no_fp16_engine_and_no_product_passes_unseen(builder, raw_graph, model_folder):
    graph = raw_graph("bert")
    _, description = builder.build(graph, read_spec(model_folder("bert")), SETTINGS, "8.9")
    layers = read_layers(description)
    with pytest.raises(GateFailed, match="asked fp16, 100% of matrix layers run fp32"):
        audit("bert", "fp16", layers, products(graph), 0.0)
    with pytest.raises(GateFailed, match=r"1 of the graph's 19 products .* such as node_unseen"):
        audit("bert", "fp32", layers, [*products(graph), "node_unseen"], 0.0)
    with pytest.raises(GateFailed, match="18 of the graph's 18 products are in no layer"):
        audit("bert", "fp32", read_layers("nothing that is a layer"), products(graph), 1.0)
    blind = [replace(layer, inputs=(), constants=()) for layer in layers]  # as if tensors were written in a new way
    with pytest.raises(GateFailed, match=r"the tensors of \d+ matrix layers are not read, such as those of "):
        audit("bert", "fp16", blind, products(graph), 1.0)


def test_types_are_read_in_both_spellings():
    """TensorRT 10 writes a tensor's type into its format, TensorRT-RTX beside it; fused products have weights."""
    old = (
        "Name: fc+gelu, LayerType: gemm, Inputs: [ { Name: x, Location: Device, Dimensions: [4,-1,32], "
        "Format/Datatype: Row major linear FP16 format }], Outputs: [ { Name: y, Dimensions: [4,-1,64], "
        "Format/Datatype: Half }], ParameterType: FullyConnected, TacticName: t, StreamId: 0, Metadata: [ONNX"
        " Layer: a][ONNX Layer: b]"
    )
    new = (
        "Name: __myl_FcAdd_myl0_36, LayerType: runtime_fusion, Inputs: [ { Name: x [profile 1], Dimensions: "
        "[1,-1,32], Strides: [-1,32,1], StrideOrder: [2,1,0], Datatype: Float, Format: (Linear) Row major }],"
        " Constants: [ { Name: bias, Dimensions: [1,1,64], Datatype: Half, Format: x }, { Name: w, "
        "Dimensions: [1,32,64], Datatype: Int8, Format: x }], Outputs: [ { Name: logits, Dimensions: "
        "[1,-1,300], Datatype: Float, Format: x }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: "
        "node_linear]"
    )
    attention = (
        "Name: _gemm_mha_v2_myl0_7, LayerType: kgen, Inputs: [ { Name: q, Dimensions: [12,-1,64], Datatype: "
        "Half }, { Name: k, Dimensions: [12,64,-1], Datatype: Half }, { Name: mask, Dimensions: [1,1,-1,-1], "
        "Datatype: Bool }], Constants: [], Outputs: [ { Name: y, Dimensions: [12,-1,64], Datatype: Half }], "
        "TacticName: _gemm_mha_v2_0x1, StreamId: 0, Metadata: [ONNX Layer: node_MatMul_170]"
    )
    first, second, third = read_layers(f"Layers:\n{old}\n  {new}\n{attention}\nBindings:\n")
    assert (third.types, third.is_product) == ({"fp16"}, True)
    assert (first.types, first.nodes, first.is_product) == ({"fp16"}, ("a", "b"), True)
    assert (second.types, [one.dims for one in second.weights]) == ({"int8"}, [(1, 32, 64)])


def test_profiles_follow_the_models_own_length_and_a_cache(model_folder):
    spec = read_spec(model_folder("bert"))
    profile = Profile(batch_size=(1, 2, 4), sequence_length=(1, 16, 512), past_length=(0, 8, 40))
    assert profile_shapes(spec.inputs[0], spec, profile) == ((1, 1), (2, 16), (4, MAX_LENGTH))
    cache = Port("past_key_values.0.key", "float32", (BATCH, 2, "past_sequence_length", 8))
    assert profile_shapes(cache, spec, profile) == ((1, 2, 0, 8), (2, 2, 8, 8), (4, 2, 40, 8))
    mask = Port("attention_mask", "int64", (BATCH, f"past_sequence_length + {SEQUENCE}"))
    assert profile_shapes(mask, spec, profile) == ((1, 1), (2, 24), (4, 40 + MAX_LENGTH))
    with pytest.raises(ValueError, match=r"sequence_length \(8, 4, 16\) must rise"):
        Profile(batch_size=(1, 1, 1), sequence_length=(8, 4, 16))


@pytest.fixture
def recipe(exported_folder, model_folder, tmp_path):
    """A recipe whose export of a bert is done elsewhere, and its section's settings."""

    def make(**settings) -> tuple[Recipe, TensorRT]:
        section = SETTINGS.model_copy(update=settings)
        (tmp_path / "export").mkdir(exist_ok=True)
        if not (tmp_path / "export" / "bert").exists():
            (tmp_path / "export" / "bert").symlink_to(exported_folder("bert"))
        export = GATES | {"models": {"bert": str(model_folder("bert"))}}
        return Recipe.model_validate({"run_dir": tmp_path, "export": export, "tensorrt": section.model_dump()}), section

    return make


def test_the_stage_leaves_plans_with_manifests_and_evidence(recipe, builder, tmp_path, capsys):
    """The dynamically quantized int8 is no graph for TensorRT: said, and left out."""
    one, _ = recipe()
    to_tensorrt.run(one)
    said = capsys.readouterr().out
    assert "bert int8: no engine: it does not take DynamicQuantizeLinear; it does not take MatMulInteger\n" in said
    assert re.search(r"bert fp32 for 12.0: .* MiB, built in [\d.]+ s; matrix layers read back: 28 in fp32\n", said)
    folder, exported = tmp_path / "tensorrt" / "bert", tmp_path / "export" / "bert"
    record = read_artifact(folder, "engines")
    assert record["parents"] == {"onnx": read_artifact(exported)["content_sha256"]}
    capabilities = ("8.0", "8.9", "12.0")
    assert [entry["what"] for entry in record["evidence"]] == [f"audit_fp32_{each}" for each in capabilities]
    for capability, entry in zip(capabilities, record["evidence"], strict=True):
        plan = folder / plan_name("fp32", capability)
        manifest = read_manifest(plan)
        assert entry["file"] == plan.name and entry["sha256"] == hash_file(plan) == manifest["plan"]["sha256"]
        assert (manifest["compute_capability"], manifest["variant"]) == (capability, "fp32")
        assert manifest["library_version"] == builder.library.__version__
        assert manifest["onnx"] == {"file": "model.onnx", "sha256": hash_file(exported / "model.onnx")}
        assert manifest["profiles"][1]["input_ids"] == [[1, 2], [4, 16], [8, 32]]
        assert manifest["audit"]["types"] == {"fp32": 28} and 0 < manifest["build_s"] < 60
        with pytest.raises(UserError, match=rf"it is for compute capability {capability}, (here is no GPU|this GPU)"):
            open_engine(plan, read_spec(exported), exported / "model.onnx")


def test_a_failed_audit_and_a_refusal_leave_nothing(recipe, builder, exported_folder, tmp_path):
    one, settings = recipe(compute_capabilities=("8.9",), variants=("fp32",))
    subject = examine("bert", exported_folder("bert"), Path("nowhere"))
    as_fp16 = Verified("fp16", subject.variants["fp32"].file, {})  # an fp32 file under fp16's name
    with pytest.raises(GateFailed, match="bert fp16 for 8.9: asked fp16, 100%"):
        build_engines(one, settings.model_copy(update={"variants": ("fp16",)}), builder,
                      replace(subject, variants={"fp16": as_fp16}))  # fmt: skip
    refusals = {
        r"builds no engine of .*model.onnx for 7.5: .*FP32 GEMM is not supported": {"compute_capabilities": ("7.5",)},
        r"tensorrt_rtx .* does not build for 9.0\nNeeded: one of SM75, SM80": {"compute_capabilities": ("9.0",)},
        r"tensorrt.hardware_compatibility is TensorRT's": {"hardware_compatibility": "ampere_plus"},
        r"tensorrt.version_compatible is TensorRT's": {"version_compatible": True},
        r"cannot read .*model_quantized.onnx: it does not take DynamicQuantizeLinear; ": {"variants": ("int8",)},
        r"tensorrt.variants names int4, which .*\nNeeded: one of fp32, int8": {"variants": ("int4",)},
    }
    for message, changes in refusals.items():
        with pytest.raises(UserError, match=message):
            build_engines(one, settings.model_copy(update=changes), builder, subject)
    assert list((tmp_path / "tensorrt").iterdir()) == []


def test_what_is_not_here_is_named(monkeypatch, builder):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(UserError, match=r"tensorrt cannot be imported: [\s\S]*pip install tensorrt"):
        load_library("tensorrt")
    other = Builder("tensorrt_rtx")
    other.ahead_of_time = False
    other.place = replace(other.place, library="tensorrt", compute_capability=None)
    with pytest.raises(UserError, match="TensorRT builds on the GPU that it builds for, and here is none"):
        choose_capabilities(SETTINGS, other)
    other.place = replace(other.place, compute_capability="9.0")
    assert choose_capabilities(SETTINGS, other) == ("9.0",)
    with pytest.raises(UserError, match=r"names 8.0; this GPU has 9.0"):
        choose_capabilities(SETTINGS.model_copy(update={"compute_capabilities": ("8.0",)}), other)


HERE = Place("tensorrt", "10.13.3.9", "9.0", "NVIDIA H100", "570.86.10")
BUILT = {"variant": "fp16", "version_compatible": False, "hardware_compatibility": "none"}


@pytest.fixture
def plan(tmp_path) -> Path:
    """A plan's files; what is in them matters to no check before the library's own."""
    path, graph = tmp_path / "model_fp16_sm90.plan", tmp_path / "model.onnx"
    path.write_bytes(bytes(range(256)) * 64)
    graph.write_bytes(b"graph")
    write_manifest(path, HERE, graph, BUILT)
    return path


def test_an_engine_of_this_place_may_be_loaded(plan):
    check_place(plan, read_manifest(plan), HERE, plan.parent / "model.onnx")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"library": "tensorrt_rtx", "library_version": "1.7.1"}, "it is for tensorrt 10.13.3.9, here is tensorrt_rtx"),
        ({"library_version": "10.14.1.48"}, "it was built by tensorrt 10.13.3.9, here is 10.14.1.48"),
        ({"compute_capability": "8.9", "gpu": "NVIDIA L40S"}, r"for .* 9.0, this GPU \(NVIDIA L40S\) has 8.9"),
        ({"compute_capability": None, "gpu": None}, "for compute capability 9.0, here is no GPU"),
        ({"gpu": "NVIDIA H200"}, "it was built on a NVIDIA H100, this is a NVIDIA H200"),
        ({"driver": "535.54.03"}, "it was built with driver 570.86.10, here is 535.54.03"),
    ],
)  # fmt: skip
def test_an_engine_of_another_place_is_refused_with_the_reason(plan, change, reason):
    with pytest.raises(UserError, match=rf"model_fp16_sm90.plan cannot run here: .*{reason}[\s\S]*lmworks tensorrt"):
        check_place(plan, read_manifest(plan), replace(HERE, **change))


def test_compatible_engines_are_let_in_where_they_are(plan):
    manifest = read_manifest(plan)
    newer, older = replace(HERE, library_version="10.14.0"), replace(HERE, library_version="10.9.0")
    check_place(plan, manifest | {"version_compatible": True}, newer)
    with pytest.raises(UserError, match="here is 10.9.0"):
        check_place(plan, manifest | {"version_compatible": True}, older)
    ampere = replace(HERE, compute_capability="8.6", gpu="NVIDIA A10")
    check_place(plan, manifest | {"hardware_compatibility": "ampere_plus"}, ampere)
    with pytest.raises(UserError, match="has 7.5"):
        check_place(
            plan, manifest | {"hardware_compatibility": "ampere_plus"}, replace(ampere, compute_capability="7.5")
        )
    sister = replace(HERE, gpu="NVIDIA H200")
    check_place(plan, manifest | {"hardware_compatibility": "same_compute_capability"}, sister)


def test_a_plan_of_other_bytes_or_of_another_graph_is_refused(plan):
    whole = plan.read_bytes()
    manifest = read_manifest(plan)
    (plan.parent / "model.onnx").write_bytes(b"another graph")
    with pytest.raises(UserError, match="it was built from another model.onnx"):
        check_place(plan, manifest, HERE, plan.parent / "model.onnx")
    plan.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=r"has 15384 bytes\nNeeded: 16384: it is cut short"):
        read_manifest(plan)
    plan.write_bytes(whole[:-1] + b"?")
    with pytest.raises(UserError, match="is not the plan that its manifest names"):
        read_manifest(plan)
    plan.write_bytes(whole)
    for text in ("{", "[]", '{"plan": {}}'):
        manifest_of(plan).write_text(text)
        with pytest.raises(UserError, match="is no manifest"):
            read_manifest(plan)
    manifest_of(plan).unlink()
    with pytest.raises(UserError, match=r"model_fp16_sm90.json is no plain file"):
        read_manifest(plan)
    manifest_of(plan).write_text(json.dumps(manifest))
    plan.rename(plan.with_name("elsewhere"))
    plan.symlink_to(plan.with_name("elsewhere"))
    with pytest.raises(UserError, match=r"model_fp16_sm90.plan is no plain file"):
        read_manifest(plan)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "bert_classifier"])
def test_an_engine_gives_its_graphs_numbers(name, cuda_graphs, raw_graph, model_folder, documents, tmp_path):
    """By either library that is here, in both profiles, twice in each so that a captured call is replayed."""
    library = "tensorrt" if __import__("importlib.util").util.find_spec("tensorrt") else "tensorrt_rtx"
    pytest.importorskip(library)
    builder = Builder(library)
    own = builder.place.compute_capability
    if builder.ahead_of_time and f"SM{own.replace('.', '')}" not in builder.library.ComputeCapability.__members__:
        pytest.skip(f"{library} {builder.place.library_version} does not build for {own}")
    spec, graph, plan = read_spec(model_folder(name)), raw_graph(name), tmp_path / plan_name("fp32", own)
    made, _ = builder.build(graph, spec, SETTINGS, own)
    plan.write_bytes(made)
    write_manifest(plan, builder.place, graph, BUILT)
    runner, reference = open_engine(plan, spec, graph, cuda_graphs), open_onnx(graph, 1)
    for batch, length in ((1, 7), (1, 7), (4, 16), (4, 16), (1, MAX_LENGTH)):
        feeds = spec.pad([documents[1][:length]] * batch, length)
        expected, found = reference.run(feeds)["logits"], runner.run(feeds)["logits"]
        np.testing.assert_allclose(found, expected, atol=1e-3)
    with pytest.raises(UserError, match="no profile of the engine takes"):
        runner.run(spec.pad([documents[1][:40]] * 4, 40))

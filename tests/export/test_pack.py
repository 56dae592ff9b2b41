"""What pack writes, read back by others (protobuf, transformers, onnxruntime), and what it refuses to pack."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoConfig, AutoTokenizer

from export import pack, verified
from export.engine_files import Place, plan_name, write_manifest
from export.io_spec import BATCH, SEQUENCE, IoSpec, Port, read_spec
from export.triton_config import Names, network_config, tokenizer_config
from export.triton_image import triton_image
from tests.export.conftest import GATES, MAX_LENGTH, PACKED, VOCABULARY
from trainer.__main__ import main
from trainer.artifact import content_hash, hash_file, hash_tree, read_artifact, write_artifact, write_json
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError
from trainer.export_config import Export, Quality
from trainer.serving_config import Pack


@pytest.fixture
def recipe(exported_folder, model_folder, tmp_path):
    """Makes a recipe whose export is done: a copy of the shared ones, to be spoilt by a test."""

    def make(*names: str, **settings) -> Recipe:
        for name in names:
            shutil.copytree(exported_folder(name), tmp_path / "export" / name)
        export = GATES | {"models": {name: str(model_folder(name)) for name in names}}
        return Recipe.model_validate({"run_dir": tmp_path, "export": export, "pack": settings})

    return make


def read_config(path: Path):
    """A config.pbtxt as Triton's own protobuf message; unknown fields and wrong types are errors."""
    message = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")
    from google.protobuf import text_format

    return text_format.Parse(path.read_text(encoding="utf-8"), message.ModelConfig())


@pytest.mark.parametrize("name", PACKED)
def test_repository_and_hub_hold_the_verified_files(name, recipe, tmp_path):
    one = recipe(name)
    pack.run(one)
    packed = tmp_path / "pack" / name
    assert [path.name for path in (tmp_path / "pack").iterdir()] == [name]
    exported = read_artifact(tmp_path / "export" / name)
    record = read_artifact(packed, "packed")
    assert record["parents"]["onnx"] == exported["content_sha256"]
    assert record["parents"]["model"] == exported["parents"]["model"]
    assert record["evidence"] == exported["evidence"]
    hashes = {proof["what"]: proof["sha256"] for proof in exported["evidence"]}
    assert record["about"]["variant"] == "int8"  # the smaller of the two
    assert hash_file(packed / "models" / name / "1" / "model.onnx") == hashes["parity_int8"]
    assert hash_file(packed / "hub" / "onnx" / "model.onnx") == hashes["parity_fp32"]
    assert hash_file(packed / "hub" / "onnx" / "model_quantized.onnx") == hashes["parity_int8"]
    assert AutoConfig.from_pretrained(packed / "hub").architectures == [
        read_spec(tmp_path / "export" / name).architecture
    ]
    ids = AutoTokenizer.from_pretrained(packed / "hub")("return first")["input_ids"]
    settings = json.loads((packed / "models" / f"{name}_tokenize" / "1" / "settings.json").read_text())
    assert settings["max_length"] == MAX_LENGTH and ids
    for file in ("client.py", "compose.yaml", "Dockerfile", "README.md", "perf_input.json"):
        assert (packed / file).is_file() and "{{" not in (packed / file).read_text(), file
    assert f'MODEL = "{name}_text"' in (packed / "client.py").read_text()


@pytest.mark.parametrize("name", PACKED)
def test_configurations_are_tritons_and_fit_the_graph(name, recipe, tmp_path):
    pack.run(recipe(name, variant="fp32", max_batch_size=16, max_queue_delay_ms=1.5, instances=2))
    models = tmp_path / "pack" / name / "models"
    configs = {path.parent.name: read_config(path) for path in models.glob("*/config.pbtxt")}
    assert all(folder == config.name for folder, config in configs.items())
    assert set(configs) == {name, f"{name}_tokenize", f"{name}_answer", f"{name}_text"}
    network = configs[name]
    session = onnxruntime.InferenceSession(models / name / "1" / "model.onnx")
    for declared, real in ((network.input, session.get_inputs()), (network.output, session.get_outputs())):
        assert [port.name for port in declared] == [port.name for port in real]
        shapes = [[axis if isinstance(axis, int) else -1 for axis in port.shape] for port in real]
        assert [[-1, *port.dims] for port in declared] == shapes  # B is Triton's own
    assert (network.backend, network.max_batch_size) == ("onnxruntime", 16)
    assert network.dynamic_batching.max_queue_delay_microseconds == 1500
    assert [group.count for group in network.instance_group] == [2]
    assert [warm.batch_size for warm in network.model_warmup] == [1, 16]
    assert_ensemble_is_connected(configs, f"{name}_text")


def assert_ensemble_is_connected(configs, ensemble):
    """Every step's inputs and outputs are those of its model, and every tensor was made by an earlier step."""
    made = {port.name: (port.data_type, list(port.dims)) for port in configs[ensemble].input}
    for step in configs[ensemble].ensemble_scheduling.step:
        model = configs[step.model_name]
        inputs = {port.name: (port.data_type, list(port.dims)) for port in model.input}
        outputs = {port.name: (port.data_type, list(port.dims)) for port in model.output}
        assert set(step.input_map) == set(inputs)
        assert {tensor: made[tensor] for tensor in step.input_map.values()} == {
            step.input_map[key]: value for key, value in inputs.items()
        }
        made |= {tensor: outputs[key] for key, tensor in step.output_map.items()}
    assert {port.name for port in configs[ensemble].output} <= set(made)


def test_a_cache_is_declared_and_begins_empty():
    """The face of a decoder with a cache, as an IoSpec declares it."""
    cache = Port("past_key_values.0.key", "float32", (BATCH, 2, "past_sequence_length", 8))
    token = Port("input_ids", "int64", (BATCH, SEQUENCE))
    out = Port("logits", "float32", (BATCH, SEQUENCE, VOCABULARY))
    spec = IoSpec("GPT2LMHeadModel", "gpt2", "causal_lm", (token, cache), (out,), MAX_LENGTH, VOCABULARY, 0)
    network = network_config(Names("m"), spec, Pack(pad_to_multiple_of=16))
    assert network["input"][1]["dims"] == [2, -1, 8]
    assert [one["value"]["dims"] for one in network["model_warmup"][0]["inputs"]] == [[16], [2, 0, 8]]
    assert [port["name"] for port in tokenizer_config(Names("m"), spec, Pack())["output"]] == [token.name, cache.name]


@pytest.fixture
def engines(tmp_path, recipe):
    """Makes an engine folder as the tensorrt stage leaves it where a GPU is; pack reads all but what is in a plan."""

    def make(library: str, *run: str) -> Recipe:
        made = recipe("bert", variant="fp32", backend="tensorrt", device="gpu", max_batch_size=16)
        folder, exported = tmp_path / "tensorrt" / "bert", tmp_path / "export" / "bert"
        folder.mkdir(parents=True)
        evidence = []
        for capability in ("8.0", "9.0"):
            plan = folder / plan_name("fp32", capability)
            plan.write_bytes(capability.encode() * 100)
            place = Place(library, "10.11.0.33", capability, "a GPU", "570.0")
            shapes = [{"input_ids": [[1, 1], [1, 8], [most, 40]]} for most in (1, 16)]
            write_manifest(plan, place, exported / "model.onnx", {"profiles": shapes})
            kinds = ["audit", *(["parity"] if capability in run else [])]
            entry = {"file": plan.name, "sha256": hash_file(plan)}
            evidence += [{"what": f"{kind}_fp32_{capability}", **entry} for kind in kinds]
        evidence += [{"what": f"{kind}_int8_static_8.0", **entry} for kind in ("audit", "parity")]
        parents = {"onnx": read_artifact(exported)["content_sha256"]}
        about = {"library": library, "library_version": "10.11.0.33"}
        write_artifact(folder, "engines", recipe_sha256="", parents=parents, evidence=evidence, about=about)
        return made

    return make


def test_engines_are_packed_by_compute_capability(engines, tmp_path):
    pack.run(engines("tensorrt", "8.0", "9.0"))
    packed = tmp_path / "pack" / "bert"
    config = read_config(packed / "models" / "bert" / "config.pbtxt")
    assert config.backend == "tensorrt" and list(config.instance_group[0].profile) == ["0", "1"]
    assert dict(config.cc_model_filenames) == {"8.0": "model_fp32_sm80.plan", "9.0": "model_fp32_sm90.plan"}
    for file in config.cc_model_filenames.values():
        assert hash_file(packed / "models" / "bert" / "1" / file) == hash_file(tmp_path / "tensorrt" / "bert" / file)
    assert not list((packed / "models" / "bert").rglob("*.onnx"))
    settings = json.loads((packed / "models" / "bert_tokenize" / "1" / "settings.json").read_text())
    assert settings["max_length"] == 40  # the engine's, below the model's own
    record = read_artifact(packed)
    assert record["about"]["image"] == "nvcr.io/nvidia/tritonserver:25.06-py3"
    assert record["parents"]["engines"] == read_artifact(tmp_path / "tensorrt" / "bert")["content_sha256"]
    docker = (packed / "Dockerfile").read_text()
    assert "FROM nvcr.io/nvidia/tritonserver:25.06-py3" in docker
    assert "libnvinfer.so.10" in docker and "assert found == 101100" in docker
    assert "capabilities: [gpu]" in (packed / "compose.yaml").read_text()


def test_engines_that_were_not_run_or_that_triton_does_not_read_are_not_packed(engines, tmp_path):
    one = engines("tensorrt", "8.0")
    with pytest.raises(GateFailed, match="model_fp32_sm90.plan was not run"):
        pack.run(one)
    shutil.rmtree(tmp_path / "export")
    shutil.rmtree(tmp_path / "tensorrt")
    one = engines("tensorrt", "8.0", "9.0")
    with pytest.raises(UserError, match="pack.max_batch_size is 17, model_fp32_sm80.plan takes 16"):
        pack.run(one.model_copy(update={"pack": one.pack.model_copy(update={"max_batch_size": 17})}))
    with pytest.raises(UserError, match="has no engine of int8"):
        pack.run(one.model_copy(update={"pack": one.pack.model_copy(update={"variant": "int8"})}))
    (tmp_path / "tensorrt" / "bert" / "model_fp32_sm80.plan").write_bytes(b"cut")
    with pytest.raises(UserError, match="model_fp32_sm80.plan has 3 bytes"):
        pack.run(one)
    shutil.rmtree(tmp_path / "export")
    shutil.rmtree(tmp_path / "tensorrt")
    with pytest.raises(UserError, match=r"are of tensorrt_rtx[\s\S]*tensorrt.library=tensorrt"):
        pack.run(engines("tensorrt_rtx", "8.0", "9.0"))
    assert not (tmp_path / "pack").exists()


def test_image_follows_the_engine():
    assert triton_image() == "nvcr.io/nvidia/tritonserver:26.08-py3"
    assert triton_image("10.11.0.33") == "nvcr.io/nvidia/tritonserver:25.06-py3"
    with pytest.raises(UserError, match=r"no Triton image is known to have TensorRT 9.9.9[\s\S]*pack.image"):
        triton_image("9.9.9")


def test_what_was_not_verified_is_not_packed(recipe, tmp_path):
    """Each spoilt export is refused, and an earlier packed folder stays as it was."""
    one = recipe("bert")
    pack.run(one)
    before = read_artifact(tmp_path / "pack" / "bert")
    exported, kept = tmp_path / "export" / "bert", tmp_path / "kept"
    shutil.copytree(exported, kept)

    def moved_weight():
        graph = onnx.load(exported / "model.onnx")
        weight = next(
            one for one in graph.graph.initializer if len(one.dims) == 2 and one.data_type == TensorProto.FLOAT
        )
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
        onnx.save(graph, exported / "model.onnx")

    def record(**changes):
        write_json(exported / "artifact.json", read_artifact(exported) | changes)

    def moved_weight_and_hash():
        moved_weight()
        record(content_sha256=hash_tree(exported))

    spoilt = {
        "is not what export left there": moved_weight,
        r"model.onnx is not the file that passed parity": moved_weight_and_hash,
        "has passed parity": lambda: record(evidence=[]),
        "was exported from another": lambda: record(parents={"model": "0" * 64}),
    }
    for message, spoil in spoilt.items():
        shutil.rmtree(exported)
        shutil.copytree(kept, exported)
        spoil()
        with pytest.raises(GateFailed, match=message):
            pack.run(one)
        assert read_artifact(tmp_path / "pack" / "bert") == before
        assert content_hash(tmp_path / "pack" / "bert") == hash_tree(tmp_path / "pack" / "bert")
        assert [path.name for path in (tmp_path / "pack").iterdir()] == ["bert"]


def test_a_form_that_passed_looser_gates_than_the_recipes_is_not_packed(recipe):
    one = recipe("bert")
    assert one.export is not None
    strict = Export.model_validate(GATES | {"parity": {"int8": {"relative_rms": 1e-5}}})
    for export, message in (
        (strict.model_copy(update={"models": one.export.models}), "has not passed the export.parity.int8 of this"),
        (one.export.model_copy(update={"quality": Quality()}), "has not passed the export.quality of this recipe"),
    ):
        with pytest.raises(GateFailed, match=message):
            pack.run(one.model_copy(update={"export": export}))


def test_weights_that_were_overwritten_in_place_are_noticed(recipe, tmp_path):
    """The record of the model's folder still says what they were."""
    one, source = recipe("bert"), tmp_path / "model"
    assert one.export is not None
    shutil.copytree(one.export.models["bert"], source)
    write_artifact(source, "model", recipe_sha256="", parents={})
    (source / "model.safetensors").write_bytes(b"others")
    with pytest.raises(GateFailed, match="was exported from another"):
        pack.run(one.model_copy(update={"export": one.export.model_copy(update={"models": {"bert": source}})}))


def test_one_graph_is_packed_without_looking_for_text(recipe, monkeypatch):
    monkeypatch.setattr(pack, "load_documents", lambda *_: pytest.fail("its graph is copied as it is"))
    pack.run(recipe("bert"))


def test_an_export_that_changes_while_it_is_packed_is_not_packed(recipe, tmp_path, monkeypatch):
    def changes(partial, subject, documents):
        (subject.folder / "model.onnx").write_bytes(b"another")
        return []

    monkeypatch.setattr(pack, "write_hub", changes)
    with pytest.raises(GateFailed, match="bert changed meanwhile"):
        pack.run(recipe("bert"))
    assert list((tmp_path / "pack").iterdir()) == []


def test_a_failure_in_the_middle_leaves_nothing(recipe, tmp_path, monkeypatch):
    one = recipe("bert")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(pack, "write_companions", fails)
    with pytest.raises(OSError, match="disk full"):
        pack.run(one)
    assert list((tmp_path / "pack").iterdir()) == []


def test_a_variant_or_model_that_is_not_there_is_named(recipe, tmp_path, exported_folder):
    one = recipe("bert", variant="fp32")
    subject = verified.examine("bert", exported_folder("bert"), Path("nowhere"))
    only_int8 = replace(subject, variants={"int8": subject.variants["int8"]})
    with pytest.raises(UserError, match=r"pack.variant is fp32, which .*[\s\S]*one of int8"):
        pack.pack_model(one, Pack(variant="fp32"), only_int8)
    other = replace(subject, spec=replace(subject.spec, task="translation"))
    with pytest.raises(UserError, match=r"bert is a translation model"):
        pack.pack_model(one, Pack(), other)
    with pytest.raises(UserError, match=r"pack.models names gpt2\nNeeded: exported models: bert"):
        pack.run(one.model_copy(update={"pack": Pack(models=("gpt2",))}))
    with pytest.raises(ValueError, match="variant bf16 runs on a GPU: set device: gpu"):
        Pack(variant="bf16")
    with pytest.raises(ValueError, match="set device: gpu"):
        Pack(backend="tensorrt")


@pytest.mark.parametrize(("name", "on_gpu"), [("gpt2", "fp32"), ("bert", "int8")])
def test_auto_takes_what_the_device_has_operators_for(name, on_gpu, exported_folder):
    """A decoder's int8 has the CPU's attention."""
    subject = verified.examine(name, exported_folder(name), Path("nowhere"))
    assert [pack.choose_variant(subject, "auto", device).variant for device in ("cpu", "gpu")] == ["int8", on_gpu]
    if name == "gpt2":
        with pytest.raises(UserError, match="pack.variant is int8, which has the attention of .*CPU"):
            pack.choose_variant(subject, "int8", "gpu")


def test_the_verb_packs_and_says_so(recipe, tmp_path, capsys):
    one = recipe("gpt2", models=["gpt2"])
    path = tmp_path / "recipe.yaml"
    tree = one.model_dump(mode="json", exclude_none=True)
    tree["export"]["quality"] = None
    path.write_text(json.dumps(tree))
    assert main(["pack", str(path)]) == 0
    said = capsys.readouterr().out
    assert re.match(rf"gpt2: int8 \(0.\d MiB\) of fp32, int8, for {triton_image()}; lmworks serve ", said)


def test_external_data_travels_with_its_graph(tmp_path):
    """A graph above 2 GiB keeps its weights in a file beside it; here a small one does."""
    weight = numpy_helper.from_array(np.ones((64, 64), dtype=np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", ports[:1], ports[1:], [weight]),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 20)],
    )
    (tmp_path / "a").mkdir()
    onnx.save(
        model, tmp_path / "a" / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0
    )
    (tmp_path / "b").mkdir()
    pack.copy_graph(tmp_path / "a" / "model.onnx", tmp_path / "b" / "other.onnx")
    (result,) = onnxruntime.InferenceSession(tmp_path / "b" / "other.onnx").run(
        None, {"x": np.ones((1, 64), np.float32)}
    )
    assert (result == 64).all()

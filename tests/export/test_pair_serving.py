"""Packed encoder-decoders: text in, the text that transformers generates out, by the Python models called as Triton
calls them, and by a real tritonserver over HTTP and gRPC."""

import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from export import pack, serve
from export.engine_files import Place, plan_name, write_manifest
from export.files import hashes
from export.io_spec import read_spec
from export.merged import merge
from export.triton_image import triton_image
from tests.export.conftest import MAX_LENGTH, PAIR_GATES, build_tokenizer, free_ports
from tests.export.test_answers import Tensor, call
from tests.export.test_pack import assert_ensemble_is_connected, read_config
from tests.export.test_serve import calls
from trainer.artifact import hash_file, read_artifact, write_artifact
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError

NEW = 12
TEXTS = ["return first", "class Point:\n    x = 0\n    y", "def add(first, second):\n    return"]


@pytest.fixture(scope="session")
def recipe_of(exported_pair, trained_pair):
    """Makes a recipe whose exports are done, in a folder of its own."""

    def make(root: Path, *names: str, **settings) -> Recipe:
        for name in names:
            shutil.copytree(exported_pair(name), root / "export" / name)
        export = PAIR_GATES | {"models": {name: str(trained_pair(name)) for name in names}}
        settings = {"variant": "fp32", "max_new_tokens": NEW} | settings
        return Recipe.model_validate({"run_dir": root, "export": export, "pack": settings})

    return make


@pytest.fixture(scope="session", params=["t5", pytest.param("bart", marks=pytest.mark.slow)])
def name(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def packed_pairs(name, recipe_of, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("packing_pairs")
    pack.run(recipe_of(root, name))
    return root / "pack"


@pytest.fixture(scope="session")
def expected(name, trained_pair) -> list[str]:
    """What transformers writes to each text."""
    tokenizer, found = build_tokenizer(), []
    model = AutoModelForSeq2SeqLM.from_pretrained(trained_pair(name), dtype=torch.float32).eval()
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        rows = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, num_beams=1
        )
        found.append(tokenizer.decode(rows[0, 1:], skip_special_tokens=True))
    assert len(set(found)) == len(TEXTS)
    return found


def test_the_repository_holds_both_verified_graphs(name, packed_pairs, exported_pair):
    packed = packed_pairs / name
    exported, record = read_artifact(exported_pair(name)), read_artifact(packed, "packed")
    proofs = {proof["what"]: proof["sha256"] for proof in exported["evidence"]}
    assert hash_file(packed / "models" / f"{name}_encoder" / "1" / "model.onnx") == proofs["encoder_parity_fp32"]
    assert hash_file(packed / "models" / f"{name}_decoder" / "1" / "model.onnx") == proofs["parity_fp32"]
    assert record["about"]["networks"] == [f"{name}_encoder", f"{name}_decoder"]
    assert record["evidence"] == exported["evidence"]
    hub = {f"{stem}{form}.onnx" for stem in ("encoder_model", "decoder_model_merged") for form in ("", "_quantized")}
    assert {path.name for path in (packed / "hub" / "onnx").iterdir()} == hub
    assert AutoTokenizer.from_pretrained(packed / "hub")(TEXTS[0])["input_ids"]
    configs = {path.parent.name: read_config(path) for path in packed.glob("models/*/config.pbtxt")}
    assert set(configs) == {f"{name}_{part}" for part in ("tokenize", "encoder", "decoder", "answer", "text")}
    for part in ("encoder", "decoder"):
        session = onnxruntime.InferenceSession(packed / "models" / f"{name}_{part}" / "1" / "model.onnx")
        for declared, real in ((configs[f"{name}_{part}"].input, session.get_inputs()),
                               (configs[f"{name}_{part}"].output, session.get_outputs())):  # fmt: skip
            shapes = {port.name: [axis if isinstance(axis, int) else -1 for axis in port.shape] for port in real}
            assert {port.name: [-1, *port.dims] for port in declared} == shapes  # B is Triton's own
    assert_ensemble_is_connected(configs, f"{name}_text")
    warm = {port: list(value.dims) for port, value in configs[f"{name}_decoder"].model_warmup[0].inputs.items()}
    heads = read_spec(exported_pair(name)).cross.heads
    assert warm["input_ids"] == [1] and warm["encoder_attention_mask"] == [32]
    assert warm["past_key_values.0.decoder.key"] == [heads, 0, 8]
    assert warm["past_key_values.0.encoder.key"] == [heads, 32, 8]
    page = (packed / "README.md").read_text()
    assert f"which calls `{name}_decoder` for each token" in page and f"of at most {NEW} tokens" in page
    assert "with encoder_model.onnx, decoder_model_merged.onnx, encoder_model_quantized.onnx" in page
    assert "{" not in page and "|\n\n## Serve" in page
    assert serve.read_packed(packed)["kind"] == "packed"


@dataclass
class Failure:
    said: str

    def message(self) -> str:
        return self.said


@dataclass
class Response:
    outputs: dict[str, np.ndarray]
    problem: str = ""

    def has_error(self) -> bool:
        return bool(self.problem)

    def error(self) -> Failure:
        return Failure(self.problem)


@pytest.fixture
def server(monkeypatch):
    """Gives the Python models a server whose other models are run by ONNX Runtime; returns the calls that it saw."""
    import sys

    from tests.export.test_answers import InferenceResponse

    seen: list[tuple[str, tuple[int, ...]]] = []
    sessions: dict[str, onnxruntime.InferenceSession] = {}

    @dataclass
    class InferenceRequest:
        model_name: str
        requested_output_names: list[str]
        inputs: list[Tensor]
        preferred_memory: object

        def exec(self) -> Response:
            feeds = {tensor.name: tensor.array for tensor in self.inputs}
            seen.append((self.model_name, feeds["input_ids"].shape))
            try:
                outputs = sessions[self.model_name].run(self.requested_output_names, feeds)
            except Exception as problem:
                return Response({}, str(problem))
            return Response(dict(zip(self.requested_output_names, outputs, strict=True)))

    module = type(sys)("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.TritonError = Tensor, InferenceResponse, str
    module.InferenceRequest, module.PreferredMemory, module.TRITONSERVER_MEMORY_CPU = InferenceRequest, tuple, 0
    module.PreferredMemory = lambda *where: where
    module.get_input_tensor_by_name = lambda request, name: Tensor(name, request[name])
    module.get_output_tensor_by_name = lambda response, name: Tensor(name, response.outputs[name])
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def start(packed: Path, name: str) -> list[tuple[str, tuple[int, ...]]]:
        for part in ("encoder", "decoder"):
            path = packed / name / "models" / f"{name}_{part}" / "1" / "model.onnx"
            sessions[f"{name}_{part}"] = onnxruntime.InferenceSession(path)
        return seen

    start.sessions = sessions
    return start


def test_the_answer_is_the_text_that_transformers_generates(name, packed_pairs, expected, server):
    """Three unequal texts in one request: one call of the decoder for each token, of all of them."""
    seen = server(packed_pairs, name)
    models = packed_pairs / name / "models"
    tensors = call(models / f"{name}_tokenize", {"TEXT": np.array([[text.encode()] for text in TEXTS], dtype=object)})
    encoder = server.sessions[f"{name}_encoder"]
    outputs = encoder.run(None, {port.name: tensors[port.name] for port in encoder.get_inputs()})
    tensors |= dict(zip((port.name for port in encoder.get_outputs()), outputs, strict=True))
    answers = [json.loads(one) for one in call(models / f"{name}_answer", tensors)["ANSWER"][:, 0]]
    assert answers == [[{"generated_text": text}] for text in expected]
    assert 1 < len(seen) <= NEW and set(seen) == {(f"{name}_decoder", (3, 1))}
    with pytest.raises(RuntimeError, match=f"{name}_decoder: "):  # the decoder's own words
        call(models / f"{name}_answer", tensors | {"present.0.encoder.key": tensors["present.0.encoder.key"][:, :, 1:]})


def test_a_folder_for_transformers_js_with_other_numbers_is_not_packed(recipe_of, monkeypatch, tmp_path):
    def faulty(files, spec, encoder, decoder):
        merge(files, spec, encoder, decoder)
        model = onnx.load(decoder)
        weight = next(one for one in model.graph.initializer if one.name.startswith("encoded/") and len(one.dims) == 2)
        moved = onnx.numpy_helper.to_array(weight) * np.float32(1.01)
        weight.CopyFrom(onnx.numpy_helper.from_array(moved, weight.name))
        onnx.save(model, decoder)

    monkeypatch.setattr(pack, "merge", faulty)
    with pytest.raises(GateFailed, match="t5 fp32 for transformers.js: .* of decoder_model_merged.onnx is off by"):
        pack.run(recipe_of(tmp_path, "t5"))
    assert not list((tmp_path / "pack").iterdir())


def test_more_tokens_than_the_model_writes_are_refused(recipe_of, tmp_path):
    with pytest.raises(UserError, match=rf"max_new_tokens is 73\nNeeded: at most {MAX_LENGTH}, what t5 writes"):
        pack.run(recipe_of(tmp_path, "t5", max_new_tokens=MAX_LENGTH + 1))


@pytest.fixture
def engines(recipe_of, tmp_path):
    """An engine folder as the tensorrt stage leaves it where a GPU is; pack reads all but what is in a plan."""
    one = recipe_of(tmp_path, "t5", backend="tensorrt", device="gpu", max_batch_size=16)
    folder, exported = tmp_path / "tensorrt" / "t5", tmp_path / "export" / "t5"
    folder.mkdir(parents=True)
    spec, place = read_spec(exported), Place("tensorrt", "10.11.0.33", "9.0", "a GPU", "570.0")
    plans = [folder / plan_name("fp32", "9.0", part.stem) for part in spec.parts]
    for plan in plans:
        plan.write_bytes(plan.name.encode() * 100)
    shapes = (
        [{"input_ids": [[1, 1], [1, 8], [16, 40]]}],
        [
            {
                "input_ids": [[1, 1], [1, 1], [16, 1]],
                "past_key_values.0.decoder.key": [[1, 3, 0, 8], [1, 3, 8, 8], [16, 3, 11, 8]],
            }
        ],
    )
    evidence = []
    for part, plan, other, profiles in zip(spec.parts, plans, plans[::-1], shapes, strict=True):
        about = {"profiles": profiles, "beside": [hashes(other)]}
        write_manifest(plan, place, exported / part.file("fp32"), about)
        evidence += [
            {"what": f"{part.prefix}{kind}_fp32_9.0", "file": plan.name, "sha256": hash_file(plan)}
            for kind in ("audit", "parity")
        ]
    parents, about = (
        {"onnx": read_artifact(exported)["content_sha256"]},
        {"library": "tensorrt", "library_version": "10.11.0.33"},
    )
    write_artifact(folder, "engines", recipe_sha256="", parents=parents, evidence=evidence, about=about)
    return one, plans


def test_both_engines_are_packed(engines, tmp_path):
    one, plans = engines
    pack.run(one)
    models = tmp_path / "pack" / "t5" / "models"
    for part, plan in zip(("encoder", "decoder"), plans, strict=True):
        config = read_config(models / f"t5_{part}" / "config.pbtxt")
        assert config.backend == "tensorrt" and dict(config.cc_model_filenames) == {"9.0": plan.name}
        assert hash_file(models / f"t5_{part}" / "1" / plan.name) == hash_file(plan)
    settings = json.loads((models / "t5_tokenize" / "1" / "settings.json").read_text())
    assert settings["max_length"] == 40  # the encoder's engine, below the model's own
    assert "FROM nvcr.io/nvidia/tritonserver:25.06-py3" in (tmp_path / "pack" / "t5" / "Dockerfile").read_text()
    shutil.rmtree(tmp_path / "pack")
    longer = one.model_copy(update={"pack": one.pack.model_copy(update={"max_new_tokens": NEW + 1})})
    with pytest.raises(UserError, match=r"max_new_tokens is 13, .* keeps 11 before one"):
        pack.run(longer)
    plans[0].write_bytes(plans[0].read_bytes()[:-1] + b"?")
    with pytest.raises((UserError, GateFailed), match="is not the plan that its manifest names"):
        pack.run(one)


@pytest.fixture(scope="session")
def clients(name, packed_pairs, environment, tmp_path_factory):
    """Clients of one server that has the packed model: (protocol's client, its module); and the packed client."""
    http_module = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    grpc_module = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
    spec = importlib.util.spec_from_file_location("client", packed_pairs / name / "client.py")
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    scratch = tmp_path_factory.mktemp("pair_server")
    shutil.copytree(packed_pairs / name / "models", scratch / "all" / "models")
    http, grpc, metrics = free_ports()
    site = serve.ensure_environment(environment, triton_image())
    with serve.serving(scratch / "all", site, serve.Endpoints("127.0.0.1", http, grpc, metrics), scratch):
        pairs = [
            (http_module.InferenceServerClient(f"127.0.0.1:{http}", concurrency=8), http_module),
            (grpc_module.InferenceServerClient(f"127.0.0.1:{grpc}"), grpc_module),
        ]
        yield pairs, client
        for each, _ in pairs:
            each.close()  # the server waits for open connections as it stops


def test_a_real_server_answers_with_the_text_that_transformers_generates(name, clients, expected):
    """Over both protocols, in one request of unequal texts, one by one, and eight requests at once."""
    pairs, client = clients
    answers = [[{"generated_text": text}] for text in expected]
    for each in pairs:
        assert client.ask(*each, TEXTS, f"{name}_text") == answers
        assert [client.ask(*each, [text], f"{name}_text")[0] for text in TEXTS] == answers
        for text, message in (("", "a text without tokens"), ("x " * 2 * MAX_LENGTH, f"the model takes {MAX_LENGTH}")):
            with pytest.raises(Exception, match=message):
                client.ask(*each, [text], f"{name}_text")
    (grpc, module), before = pairs[1], calls(pairs[1][0], f"{name}_answer")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: client.ask(grpc, module, [text], f"{name}_text"), TEXTS * 8))
    assert [one for (one,) in found] == answers * 8
    after = calls(grpc, f"{name}_answer", before[0] + len(TEXTS) * 8)
    texts, executions = (now - then for now, then in zip(after, before, strict=True))
    assert texts == len(TEXTS) * 8 and executions < texts

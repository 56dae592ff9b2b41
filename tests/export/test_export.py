"""The export stage on real models of every architecture: what it writes, what it refuses, what it leaves on failure."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertForMultipleChoice

from export import export as stage
from export.cases import load_documents
from export.io_spec import read_spec
from export.runners import open_runner, torch_runner
from export.to_onnx import export_graph, load_model, take_softmax_as_it_is
from tests.export.conftest import MAX_LENGTH, architectures, build_model, build_tokenizer
from trainer import prepare
from trainer.artifact import content_hash, hash_file, read_artifact
from trainer.config import Recipe
from trainer.data.shards import TokenShards
from trainer.errors import GateFailed, UserError
from trainer.export_config import Export, Tolerance

# Random weights make near-ties of all logits, so that int8 is judged here by its error alone.
LOOSE = {"relative_rms": 0.15, "min_top1": 0.0}
SETTINGS = Export.model_validate(
    {
        "quality": None,
        "parity": {"int8": LOOSE, "int8_static": LOOSE | {"relative_rms": 0.3}, "int4": LOOSE | {"relative_rms": 0.5}},
    }
)
EVERY = ("fp32", "fp16", "bf16", "int8", "int8_static")


def operators(path):
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("name", architectures("qwen2", "qwen3"))  # Llama with biases, with norms
def test_every_architecture_passes_the_gate_and_is_described(name, model_folder, documents, tmp_path):
    folder = model_folder(name)
    variants = EVERY + ("int4", "fp32_fused") * bool(read_spec(folder).cache)
    parity = SETTINGS.parity.model_copy(update={"shapes": ((1, 7), (3, 33), (4, 64), (7, 16))})
    settings = SETTINGS.model_copy(update={"variants": variants, "parity": parity})
    target = stage.export_model(Recipe(run_dir=tmp_path), settings, "m", folder, documents)
    record = read_artifact(target, "onnx")
    assert record["parents"] == {"model": content_hash(folder)}
    assert [entry["what"] for entry in record["evidence"]] == [f"parity_{variant}" for variant in variants]
    for entry in record["evidence"]:
        assert entry["sha256"] == hash_file(target / entry["file"])
        assert entry["metrics"]["cases"] == len({case["case"] for case in entry["cases"]}) >= 5
        assert 0 < entry["metrics"]["relative_rms"] < entry["thresholds"]["relative_rms"]
    tried = {case["case"] for case in record["evidence"][0]["cases"]}
    assert {"1x1", "7x16", f"1x{MAX_LENGTH}"} <= tried
    if read_spec(folder).cache:  # a past of all but one token, and as many steps as fit after the prompt
        assert {f"1x1 after {MAX_LENGTH - 1}", "3x5 and 64 steps", "7x1 after 16 padded left"} <= tried
    raw = onnx.load(target / "model.onnx")
    assert {node.domain for node in raw.graph.node} == {""}
    assert [value.name for value in raw.graph.input] == [port.name for port in read_spec(folder).inputs]
    assert "MatMulInteger" in operators(target / "model_quantized.onnx")
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(target / "model_int8_static.onnx")
    assert "MatMulNBits" in operators(target / "model_q4.onnx") if "int4" in variants else True
    stored = {one.data_type for one in onnx.load(target / "model_fp16.onnx").graph.initializer if len(one.dims) == 2}
    assert stored - {onnx.TensorProto.INT64} == {onnx.TensorProto.FLOAT16}
    assert AutoConfig.from_pretrained(target).model_type == read_spec(folder).model_type
    assert AutoTokenizer.from_pretrained(target)("a")["input_ids"]
    told = json.loads((target / "tokenizer_config.json").read_text())  # transformers 4 knows no TokenizersBackend
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not (target / "model.safetensors").exists()


@pytest.fixture
def as_loaded(model_folder, tmp_path):
    """Gives the nodes that ONNX Runtime makes of a tiny model's graph."""

    def give(name):
        folder = model_folder(name)
        spec, raw, loaded = read_spec(folder), tmp_path / "model.onnx", tmp_path / "loaded.onnx"
        export_graph(load_model(folder, spec), spec, raw, 20)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(loaded)
        onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
        return onnx.load(loaded).graph.node

    return give


@pytest.mark.parametrize(("name", "norms"), [("llama", 5), ("qwen3", 9), ("t5", 7)])
def test_a_norm_by_the_root_mean_square_is_one_node(name, norms, as_loaded):
    """Two a layer and the last; with Qwen3 those of queries and keys; of T5's decoder three a layer."""
    kinds = [node.op_type for node in as_loaded(name)]
    assert sum("SimplifiedLayerNormalization" in kind for kind in kinds) == norms and "Sqrt" not in kinds


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_no_key_is_copied_to_be_multiplied(name, as_loaded):
    """Of a cache: ONNX Runtime takes the transpose into the product."""
    nodes = as_loaded(name)
    turned = [
        {one.name: list(one.ints) for one in node.attribute}["perm"] for node in nodes if node.op_type == "Transpose"
    ]
    assert [0, 1, 3, 2] not in turned and [0, 2, 1] not in turned
    taken_in = [node for node in nodes if node.op_type == "FusedMatMul"
                and {one.name: one.i for one in node.attribute}["transB"]]  # fmt: skip
    assert len(taken_in) >= 2


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "bart"])
def test_nothing_stands_between_softmax_and_its_product(name, model_folder, tmp_path):
    """The exporter's test for NaN is gone, as masks hold finite numbers."""
    folder = model_folder(name)
    spec = read_spec(folder)
    for part in spec.parts:
        export_graph(load_model(folder, spec), part, tmp_path / "model.onnx", 20)
        assert "IsNaN" not in operators(tmp_path / "model.onnx")


@pytest.mark.parametrize(("mask", "kept"), [("least", False), ("infinite", True), ("given", True)])
def test_a_row_that_could_be_nan_keeps_its_zeros(mask, kept):
    """Attention as the exporter writes it, with masks of the least number, of minus infinity, and of an input's."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        attend (float[2, 3] scores, bool[2, 3] seen, float given, float[3, 1] values) => (float[2, 1] made)
        <float none = {{0.0}}, float least = {{-3.4e38}}, float infinite = {{-inf}}> {{
            mask = Where (seen, none, {mask})
            masked = Add (scores, mask)
            probabilities = Softmax (masked)
            wrong = IsNaN (probabilities)
            right = Where (wrong, none, probabilities)
            made = MatMul (right, values)
        }}""")
    inner = ir.from_proto(model)
    take_softmax_as_it_is(inner)
    assert any(node.op_type == "IsNaN" for node in inner.graph) == kept
    scores, seen = np.arange(6, dtype="f").reshape(2, 3), np.array([[True, False, True], [False] * 3])
    inputs = {"scores": scores, "seen": seen, "given": np.float32(-1), "values": np.ones((3, 1), "f")}
    before, after = (onnx.reference.ReferenceEvaluator(one).run(None, inputs) for one in (model, ir.to_proto(inner)))
    np.testing.assert_array_equal(before, after)


def test_int8_alone_has_no_raw_graph_and_a_quantized_head(model_folder, documents, tmp_path):
    """A tied head is a transposed embedding table: left alone it would stay an fp32 MatMul."""
    settings = SETTINGS.model_copy(update={"variants": ("int8",)})
    target = stage.export_model(Recipe(run_dir=tmp_path), settings, "m", model_folder("gpt2"), documents)
    assert [file.name for file in target.glob("*.onnx*")] == ["model_quantized.onnx"]
    graph = onnx.load(target / "model_quantized.onnx").graph
    constants = {initializer.name for initializer in graph.initializer}
    parent, child = read_artifact(target, "onnx")["evidence"]
    assert (parent["what"], child["what"]) == ("parent_parity_fp32", "parity_int8") and "file" not in parent
    assert len(parent["parent_sha256"]) == 64 and parent["metrics"]["relative_rms"] < 1e-5
    assert not [n.name for n in graph.node if n.op_type in ("MatMul", "Gemm") and constants & set(n.input)]
    assert not [n.name for n in graph.node if n.op_type == "Transpose" and n.input[0] in constants]


def move_one_weight(monkeypatch):
    """Plant a fault in the export: what is traced has one weight that is 1 % larger than the folder's."""

    def load(folder, spec):
        model = load_model(folder, spec)
        with torch.no_grad():
            weight = model.get_parameter("bert.encoder.layer.0.output.dense.weight")
            weight.view(-1)[weight.abs().argmax()] *= 1.01
        return model

    monkeypatch.setattr(stage, "load_model", load)


@pytest.mark.parametrize("variants", [("int8",), ("int8", "fp32"), ("int8_static", "fp16")])
def test_an_export_fault_is_no_int8s_to_hide(variants, model_folder, documents, tmp_path, monkeypatch):
    """int8's own gate, some thousand times looser, would let it pass: fp32 is held first, shipped or not."""
    settings = SETTINGS.model_copy(update={"variants": variants})
    move_one_weight(monkeypatch)
    with pytest.raises(GateFailed, match=r"m fp32 \(model.onnx\): case .*relative_rms"):
        stage.export_model(Recipe(run_dir=tmp_path), settings, "m", model_folder("bert"), documents)
    assert list((tmp_path / "export").iterdir()) == []


def test_a_missed_gate_leaves_nothing_new_behind(model_folder, documents, tmp_path):
    strict = Export(quality=None, parity=SETTINGS.parity.model_copy(update={"int8": Tolerance(relative_rms=1e-9)}))
    recipe = Recipe(run_dir=tmp_path)
    with pytest.raises(GateFailed, match=r"m int8 \(model_quantized.onnx\): case .*relative_rms"):
        stage.export_model(recipe, strict, "m", model_folder("bert"), documents)
    assert list((tmp_path / "export").iterdir()) == []
    target = stage.export_model(recipe, SETTINGS, "m", model_folder("bert"), documents)
    before = read_artifact(target)
    other = strict.model_copy(update={"models": {"m": model_folder("bert", 1)}})
    with pytest.raises(GateFailed, match=r"(?s)relative_rms.*Do: `lmworks verify export RECIPE --bisect`"):
        stage.run(Recipe(run_dir=tmp_path, export=other))
    assert read_artifact(target) == before


_KILLED = """
import os, sys
from pathlib import Path
import numpy as np
from export import export as stage
from trainer.config import Recipe
from trainer.export_config import Export
stage.make_variant = lambda variant, raw, file, *rest: (file.write_bytes(b"half"), os._exit(9))
documents = [np.arange(5, 200)]
stage.export_model(Recipe(run_dir=Path(sys.argv[2])), Export(quality=None), "m", Path(sys.argv[1]), documents)
"""


def test_a_crash_in_the_middle_leaves_no_export(model_folder, documents, tmp_path):
    """The process dies while it quantizes; the target is not there, and the next run clears the rest."""
    command = [sys.executable, "-c", _KILLED, str(model_folder("bert")), str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == 9
    assert not (tmp_path / "export" / "m").exists()
    target = stage.export_model(Recipe(run_dir=tmp_path), SETTINGS, "m", model_folder("bert"), documents)
    assert list((tmp_path / "export").iterdir()) == [target]


def test_stage_exports_a_foreign_folder_on_the_standard_librarys_text(model_folder, tmp_path):
    """No prepare section, no shards: the text is Python's own, in the model's own tokens."""
    folder = model_folder("distilbert")
    recipe = Recipe.model_validate(
        {"run_dir": tmp_path, "export": {"models": {"mine": folder}, "variants": ["fp32"], "quality": None}}
    )
    assert max(len(ids) for ids in load_documents(recipe, folder)) > 100
    stage.run(recipe)
    outputs = open_runner(tmp_path / "export" / "mine", "onnx_fp32", 1).run(
        read_spec(folder).pad([np.array([5, 6, 7])], 3)
    )
    assert outputs["logits"].shape == (1, 3, 300)


WHOLE, IN_SHARDS = "5GB", "30KB"


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("bert", torch.float32, IN_SHARDS),
        ("llama", torch.bfloat16, WHOLE),
        pytest.param("gpt2", torch.bfloat16, IN_SHARDS, marks=pytest.mark.slow),
    ],
    ids=["shards", "bf16", "both"],
)
def test_weights_in_shards_or_in_bf16_are_exported(name, dtype, size, documents, tmp_path):
    """As users download them; the graph has the numbers that were stored, in fp32."""
    folder, source = tmp_path / "model", build_model(name)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(parameter.to(dtype))
    copy.deepcopy(source).to(dtype).save_pretrained(folder, max_shard_size=size)
    build_tokenizer().save_pretrained(folder)
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 2 if size == IN_SHARDS else len(files) == 1
    assert {weight.dtype for file in files for weight in load_file(file).values()} == {dtype}
    settings = SETTINGS.model_copy(update={"variants": ("fp32",)})
    target = stage.export_model(Recipe(run_dir=tmp_path), settings, "m", folder, documents)
    (proof,) = read_artifact(target, "onnx")["evidence"]
    assert 0 < proof["metrics"]["relative_rms"] < 1e-5
    assert not list(target.glob("*.safetensors*"))
    spec = read_spec(folder)
    inputs = spec.pad([np.arange(5, 20), np.arange(30, 37)], 15)
    found, expected = open_runner(target, "onnx_fp32", 1).run(inputs), torch_runner(source, spec).run(inputs)
    real = inputs["attention_mask"] == 1
    np.testing.assert_allclose(found["logits"][real], expected["logits"][real], atol=1e-4)


@pytest.fixture
def prepared_lines(tmp_path):
    """A recipe that is prepared, on a file of 200 lines."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of the text" for number in range(200)))
    recipe = Recipe.model_validate(
        {
            "run_dir": tmp_path / "run",
            "prepare": {
                "sources": [{"type": "text", "paths": [str(text)], "document": "line"}],
                "tokenizer": {"type": "wordpiece", "vocab_size": 80},
                "validation_fraction": 0.4,
            },
        }
    )
    prepare.run(recipe)
    return recipe, text


def test_text_comes_from_the_validation_split(prepared_lines):
    """Evenly over all its documents, as those of one source stand together; never from the training split."""
    recipe, text = prepared_lines
    text.unlink()  # a model with the run's own vocabulary needs nothing but the shards
    shards = TokenShards.open(recipe.data_dir, "validation")
    assert len(shards) > 40
    few = load_documents(recipe, recipe.tokenizer_dir, limit=10)
    step = -(-len(shards) // 10)
    assert [ids.tolist() for ids in few] == [shards.read(i).tolist() for i in range(0, len(shards), step)]
    assert len(load_documents(recipe, recipe.tokenizer_dir)) == len(shards)


def test_a_model_with_another_vocabulary_gets_the_validation_text_in_its_own_tokens(prepared_lines, model_folder):
    recipe, text = prepared_lines
    foreign = model_folder("bert")
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (foreign, recipe.tokenizer_dir))
    shards = TokenShards.open(recipe.data_dir, "validation")
    lines = [ours.decode(shards.read(index)) for index in range(len(shards))]
    expected = theirs(lines, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in load_documents(recipe, foreign)] == expected
    assert len(load_documents(recipe, foreign, limit=7)) == 7
    text.unlink()
    with pytest.raises(UserError, match=r"bert-0 reads other tokens .* has id .*, and its text is gone: .*text.txt"):
        load_documents(recipe, foreign)


def broken(folder: Path, source: Path, **changes) -> Path:
    """A copy of a model folder with other values in its config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_models_that_cannot_be_read_are_one_message(tmp_path, model_folder, documents):
    """A layer norm that is missing would be made up alike in source and graph, so that parity would hold."""
    bert, llama = model_folder("bert"), model_folder("llama")
    lacking = broken(tmp_path / "lacking", bert)
    weights = load_file(lacking / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layer.1.output.LayerNorm" not in name}
    save_file(kept, lacking / "model.safetensors", {"format": "pt"})
    cut = broken(tmp_path / "cut", bert)
    (cut / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes()[:5000])
    shards = tmp_path / "shards"
    build_model("bert").save_pretrained(shards, max_shard_size=IN_SHARDS)
    sorted(shards.glob("*.safetensors"))[1].unlink()
    no_json = broken(tmp_path / "no_json", bert)
    (no_json / "config.json").write_text('{"architectures": ["Ber')
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    cases = {
        lacking: "lacks 2 of the weights of BertForMaskedLM, first bert.encoder.layer.1.output.LayerNorm.bias",
        cut: "(?i)cut: .*header",
        shards: "shards: No such file or directory: .*model-00002-of-",
        no_json: "no_json/config.json: ",
        broken(tmp_path / "unknown", bert, model_type="nonesuch"): "unknown/config.json: .*nonesuch",
        broken(tmp_path / "untyped", bert, model_type=None): "untyped/config.json: ",
        broken(tmp_path / "rope", llama, rope_parameters=rope): "torch cannot export this LlamaForCausalLM: ",
    }
    for folder, message in cases.items():
        with pytest.raises(UserError, match=message):
            stage.export_model(Recipe(run_dir=tmp_path), SETTINGS, "m", folder, documents)
    assert not (tmp_path / "export" / "m").exists()
    assert read_spec(broken(tmp_path / "pad", llama, pad_token_id=-1)).pad_id == 0


def test_refusals(tmp_path, model_folder, documents):
    small = BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=9)
    BertForMultipleChoice(small).save_pretrained(tmp_path / "bare")
    bert = str(model_folder("bert"))
    cases = [
        ({"models": {"m": str(tmp_path / "bare")}}, "architecture BertForMultipleChoice .*\n.*BertForMaskedLM"),
        ({"models": {"m": str(tmp_path / "nothing")}}, "holds no config.json"),
        ({}, "there is no model to export"),
        ({"models": {"m": bert}, "variants": ["int4"]}, r"int4 of m, a BertForMaskedLM"),
        ({"models": {"m": bert}, "variants": ["fp32_fused"]}, r"no fp32_fused of m, a BertForMaskedLM, on CPU"),
    ]
    for section, message in cases:
        with pytest.raises(UserError, match=message):
            stage.run(Recipe.model_validate({"run_dir": tmp_path, "export": section}))
    with pytest.raises(UserError, match="no `export` section"):
        stage.run(Recipe(run_dir=tmp_path))
    too_large = [*documents, np.array([300])]
    with pytest.raises(UserError, match="holds token 300"):
        stage.export_model(Recipe(run_dir=tmp_path), SETTINGS, "m", model_folder("bert"), too_large)


def test_weights_in_a_pickle_are_not_opened(model_folder, documents, tmp_path):
    """The planted pickle would write a file when it is loaded."""
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder("bert"), folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Planted(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled holds no model.safetensors"):
        stage.export_model(Recipe(run_dir=tmp_path), SETTINGS, "m", folder, documents)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "export").exists()


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_tokenizer_is_needed_where_there_are_no_shards(model_folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    config = json.loads((model_folder("bert") / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no tokenizer files"):
        load_documents(Recipe(run_dir=tmp_path), bare)

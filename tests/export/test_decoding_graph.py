"""A graph for decoding: the same model at every depth of its cache, which may have room to spare, and fewer logits."""

import json
import runpy
import shutil
import sys
from collections import Counter
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export import files
from export import generate as generation
from export.cache import cache_cases
from export.cases import make_cases
from export.decoding_graph import for_decoding, has_room
from export.generate import InPlaceDecoder, Sampling, decoder_of, generate
from export.io_spec import read_spec
from export.pack import TRITON_MODELS
from export.parity import check_parity
from export.runners import CPU_PROVIDER, CUDA_PROVIDER, open_onnx, open_torch
from export.variants import make_variant
from tests.export.test_generate import NEW, PROMPTS, SEEDS, of_transformers
from trainer.errors import GateFailed, UserError
from trainer.export_config import Calibration, Parity

FP32 = Parity().fp32
DECODERS = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]  # the same heads of keys as of queries, and fewer; a window


@pytest.fixture
def fused(raw_graph, tmp_path):
    """Gives the fused fp32 graph of a tiny model, in a file."""

    def give(name, seed=0):
        model = onnx.load(raw_graph(name, seed))
        assert for_decoding(model)
        onnx.save(model, tmp_path / f"{name}.onnx")
        onnx.checker.check_model(str(tmp_path / f"{name}.onnx"), full_check=True)
        return tmp_path / f"{name}.onnx"

    return give


def gate(name, path, model_folder, documents):
    """The fp32 parity gate, cache cases included, on a file."""
    spec, source = read_spec(model_folder(name)), open_torch(model_folder(name), 1)
    cases = make_cases(documents, spec, Parity().shapes, longest=1024) + cache_cases(documents, spec, source, 1024)
    expected = [source.run(case.inputs) for case in cases]
    return check_parity(name, spec, open_onnx(path, 1), cases, expected, FP32)


@pytest.mark.parametrize("name", DECODERS)
def test_it_is_the_same_model(name, model_folder, raw_graph, fused, documents):
    """Left and right padding, one new token and several after a past, 64 steps; under fp32's gate."""
    path = fused(name)
    assert gate(name, path, model_folder, documents)["metrics"]["relative_rms"] < 2e-6
    plain, graph = onnx.load(raw_graph(name)).graph, onnx.load(path).graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts["GroupQueryAttention"] == 2 and not counts["Softmax"] and not counts["IsNaN"]
    assert counts["RotaryEmbedding"] == (0 if name == "gpt2" else 4) and not counts["Transpose"] - (name == "gpt2")
    before, after = ([str(port) for port in (*each.input, *each.output)] for each in (plain, graph))
    assert [port for port in after if "num_logits_to_keep" not in port] == before
    opened = [open_onnx(each, 1) for each in (raw_graph(name), path)]
    assert opened[0].inputs == opened[1].inputs and opened[0].outputs == opened[1].outputs
    read = {name for node in graph.node for name in node.input}
    assert {weight.name for weight in graph.initializer} <= read
    pasts = {value.name for value in graph.input if value.name.startswith("past")}
    copied = [
        node.name for node in graph.node if node.op_type in ("Concat", "Expand") and pasts.intersection(node.input)
    ]
    assert not copied


def test_queries_keys_and_values_of_one_product_are_taken_as_they_come(fused):
    """GPT-2's are one product, which nothing splits any more; a Llama's are three, and turned by their positions."""
    (gpt2, *_), (llama, *_) = (
        [node for node in onnx.load(fused(name)).graph.node if node.op_type == "GroupQueryAttention"]
        for name in ("gpt2", "llama")
    )
    assert list(gpt2.input[1:3]) == ["", ""] and all(llama.input[:3])
    heads = [{one.name: one.i for one in node.attribute if one.name.endswith("heads")} for node in (gpt2, llama)]
    assert heads == [{"num_heads": 4, "kv_num_heads": 4}, {"num_heads": 4, "kv_num_heads": 2}]


def swap_layers(graph):
    layers = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    for place in (3, 4):
        first, second = (node.input[place] for node in layers)
        layers[0].input[place], layers[1].input[place] = second, first


def write_one_early(graph):
    one = next(weight for weight in graph.initializer if weight.name == "attention_one")
    one.CopyFrom(numpy_helper.from_array(np.array([2], np.int32), one.name))


def ignore_padding(graph):
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input[10] = ""


def scale_more(graph):
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "scale":
                attribute.f *= 1.01


def turn_the_other_way(graph):
    for node in graph.node:
        if node.op_type == "RotaryEmbedding":
            node.input[2], node.input[3] = node.input[3], node.input[2]


@pytest.mark.parametrize("fault", [turn_the_other_way, swap_layers, write_one_early, ignore_padding, scale_more])
def test_a_fault_is_caught(fault, model_folder, fused, documents):
    path = fused("llama")
    model = onnx.load(path)
    fault(model.graph)
    onnx.save(model, path)
    with pytest.raises(GateFailed):
        gate("llama", path, model_folder, documents)


@pytest.mark.parametrize(("name", "room"), [("gpt2", 256), ("gpt2", 4), *((name, 4) for name in DECODERS[1:])])
def test_text_in_place_is_that_of_transformers(name, room, model_folder, fused, monkeypatch):
    """Token by token, with room for all of it, and where the room ends again and again."""
    seed = SEEDS.get(name, 0)
    folder = model_folder(name, seed)
    runner, spec = open_onnx(fused(name, seed), 1), read_spec(folder)
    assert isinstance(decoder_of(runner, spec), InPlaceDecoder)
    monkeypatch.setattr(generation, "decoder_of", lambda *given: InPlaceDecoder(*given[:2], room))
    for prompts in (PROMPTS, PROMPTS[:1]):
        assert generate(runner, spec, prompts, Sampling(NEW)) == of_transformers(folder, prompts).tolist()


def test_a_step_writes_behind_what_is_there(model_folder, fused):
    """No key and no value moves: the same memory before and after, of which a step changes one token's place."""
    spec, runner = read_spec(model_folder("llama")), open_onnx(fused("llama"), 1)
    decoder, mask = InPlaceDecoder(runner, spec), np.ones((1, 3), dtype=np.int64)
    _, cache = decoder.advance(spec.token_feeds(np.array([[4, 5, 6]]), mask), None)
    for array in cache.arrays:
        array[:, :, 3:] = 7.0
    before, places = [array.copy() for array in cache.arrays], [array.ctypes.data for array in cache.arrays]
    feeds = spec.token_feeds(np.array([[9]]), np.ones((1, 4), dtype=np.int64))
    _, after = decoder.advance(feeds, cache)
    assert after is cache and [array.ctypes.data for array in after.arrays] == places
    for old, new in zip(before, after.arrays, strict=True):
        changed = np.unique(np.nonzero(old != new)[2])
        assert changed.tolist() == [3]
        new[:, :, 4:] = np.nan  # what was never written is never read
    feeds = spec.token_feeds(np.array([[8]]), np.ones((1, 5), dtype=np.int64))
    whole = runner.run(spec.feeds(np.array([[4, 5, 6, 9, 8]]), np.ones((1, 5), dtype=np.int64)))["logits"]
    np.testing.assert_allclose(decoder.advance(feeds, cache)[0], whole[:, -1:], atol=1e-5)


def test_logits_are_those_of_as_many_tokens_as_are_asked_for(model_folder, fused):
    """All without asking; a tied table of words and a padded row included."""
    spec, runner = read_spec(model_folder("gpt2")), open_onnx(fused("gpt2"), 1)
    inputs = spec.feeds(np.array([[4, 5, 6], [0, 8, 9]]), np.array([[1, 1, 1], [0, 1, 1]]))
    whole = runner.run(inputs)["logits"]
    assert whole.shape[1] == 3
    for kept in (1, 2, 0):
        (some,) = runner.session.run(["logits"], inputs | {"num_logits_to_keep": np.array(kept)})
        np.testing.assert_allclose(some, whole[:, -kept:], atol=1e-6)
    decoder = InPlaceDecoder(runner, spec)
    feeds = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}
    for whole_wanted, expected in ((False, whole[:, -1:]), (True, whole)):
        np.testing.assert_allclose(decoder.advance(feeds, None, whole_wanted)[0], expected, atol=1e-6)


def test_the_laptops_server_takes_texts_apart_where_it_must(model_folder, fused, monkeypatch, tmp_path):
    """What Triton merged: several tokens of two texts after their pasts."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    served = runpy.run_path(str(TRITON_MODELS / "run_onnx.py"))["TritonPythonModel"]()
    spec, file = read_spec(model_folder("llama")), tmp_path / "1" / "model.onnx"
    file.parent.mkdir()
    shutil.copyfile(fused("llama"), file)
    names = [[{"name": port.name} for port in ports] for ports in (spec.inputs, spec.outputs)]
    config = json.dumps(dict(zip(("input", "output"), names, strict=True)))
    served.initialize({"model_repository": str(tmp_path), "model_version": "1", "model_config": config})
    runner, ids = open_onnx(file, 1), np.arange(10).reshape(2, 5) + 40
    past = spec.cache.next_past(runner.run(spec.feeds(ids[:, :3], np.ones((2, 3), dtype=np.int64))))
    for length in (1, 2):
        feeds = spec.feeds(ids[:, 3 : 3 + length], np.ones((2, 3 + length), dtype=np.int64), past)
        for given, expected in zip(served._run(feeds), runner.run(feeds).values(), strict=True):
            np.testing.assert_allclose(given, expected, atol=1e-6)


def test_what_has_no_cache_of_its_own_stays_as_it_is(raw_graph):
    model = onnx.load(raw_graph("bert"))
    before = model.SerializeToString()
    assert not for_decoding(model) and model.SerializeToString() == before


def other_mask(graph, softmax):
    """An addition that no exporter writes: the mask is not looked for behind it."""
    graph.node.insert(
        list(graph.node).index(softmax), helper.make_node("Neg", [softmax.input[0]], ["negated"], name="planted")
    )
    softmax.input[0] = "negated"


def other_reader(graph, softmax):
    """Somebody else reads a past's numbers, which may be followed by others."""
    name = next(value.name for value in graph.input if value.name.startswith("past"))
    graph.node.append(helper.make_node("Neg", [name], ["negated"], name="planted"))


def whole_shape(graph, softmax):
    """A past's length is read in another way, and would be that of its room."""
    name = next(value.name for value in graph.input if value.name.startswith("past"))
    graph.node.append(helper.make_node("Shape", [name], ["shape"], name="planted"))


def test_positions_that_are_not_known_are_turned_as_before(raw_graph, model_folder, documents, tmp_path):
    """Of one layer's keys, whose halves here are not halves: all else is fused, and the model stays the same."""
    model = onnx.load(raw_graph("llama"))
    joined = [node for node in model.graph.node if node.op_type == "Neg"][1]
    planted = helper.make_node("Identity", [joined.output[0]], ["planted"], name="planted")
    reader = next(node for node in model.graph.node if joined.output[0] in node.input)
    reader.input[0] = "planted"
    model.graph.node.insert(list(model.graph.node).index(reader), planted)
    assert for_decoding(model)
    onnx.save(model, tmp_path / "model.onnx")
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["RotaryEmbedding"] == 3 and kinds["GroupQueryAttention"] == 2
    assert gate("llama", tmp_path / "model.onnx", model_folder, documents)


@pytest.mark.parametrize("change", [other_mask, other_reader, whole_shape])
def test_what_is_not_known_stays_as_it_is(change, raw_graph, tmp_path):
    """In the last layer, so that the others alone would fit. int8 is then made without; fp32_fused there is none."""
    model = onnx.load(raw_graph("gpt2"))
    change(model.graph, [node for node in model.graph.node if node.op_type == "Softmax"][-1])
    before = model.SerializeToString()
    assert not for_decoding(model) and model.SerializeToString() == before
    onnx.save(model, tmp_path / "raw.onnx")
    make_variant("int8", tmp_path / "raw.onnx", tmp_path / "int8.onnx", list, Calibration())
    assert not open_onnx(tmp_path / "int8.onnx", 1).room_in_past
    with pytest.raises(UserError, match="no fp32_fused of raw.onnx: (its attention is none|somebody reads more)"):
        make_variant("fp32_fused", tmp_path / "raw.onnx", tmp_path / "fused.onnx", list, Calibration())


@pytest.mark.parametrize(("provider", "fused_nodes"), [(CPU_PROVIDER, 2), (CUDA_PROVIDER, 0)])
@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_quantized_forms_take_it(variant, provider, fused_nodes, raw_graph, tmp_path):
    """CUDA's provider has no such node in fp32. What TensorRT and others read keeps to standard operators."""
    file = tmp_path / "form.onnx"
    make_variant(variant, raw_graph("gpt2"), file, list, Calibration(), provider)
    nodes = onnx.load(file).graph.node
    assert sum(node.op_type == "GroupQueryAttention" for node in nodes) == fused_nodes
    assert open_onnx(file, 1).room_in_past == has_room(file) == bool(fused_nodes)


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_a_quantized_form_gives_in_place_what_it_gives_otherwise(variant, model_folder, raw_graph, tmp_path):
    """One text, so that activations are quantized alike; weights beside the graph."""
    file, spec = tmp_path / "form.onnx", read_spec(model_folder("llama"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "LARGE_BYTES", 1000)
        make_variant(variant, raw_graph("llama"), file, list, Calibration())
    assert files.data_file(file).is_file()
    runner, past, buffers = open_onnx(file, 1), None, None
    decoder = InPlaceDecoder(runner, spec, room=4)
    for end in range(1, 12):
        feeds = spec.feeds(np.array([[40 + end]]), np.ones((1, end), dtype=np.int64), past)
        expected = runner.run(feeds)
        past = spec.cache.next_past(expected)
        tokens = {name: feeds[name] for name in ("input_ids", "attention_mask", "position_ids")}
        logits, buffers = decoder.advance(tokens, buffers)
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-6)

"""Encoder-decoders in transformers.js's layout: its loop over the two files writes transformers' text, in every form,
and what was moved wrongly is caught before it is packed."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoModelForSeq2SeqLM

from export.gates import Gates
from export.io_spec import read_spec
from export.merged import HIDDEN, MERGED_STEM, USE_CACHE, merge, prove_merged
from export.runners import open_onnx_graphs
from export.variants import make_variant
from tests.export.conftest import PAIR_GATES, build_tokenizer
from trainer.errors import GateFailed, UserError
from trainer.export_config import Calibration, Export

NEW = 12
SETTINGS = Export.model_validate(PAIR_GATES)
NAMES = ("t5", pytest.param("bart", marks=pytest.mark.slow))
TEXTS = ("return first", "class Point:\n    x = 0\n    y", "def add(first, second):\n    return")


@pytest.fixture(scope="module")
def laid_out(exported_pair, trained_pair, pieces, tmp_path_factory):
    """Gives the two verified files of a form, and the two that are made of them; not to be changed."""
    root = tmp_path_factory.mktemp("merged")

    def give(name: str, form: str) -> tuple[list[Path], Path, Path]:
        folder, spec, target = exported_pair(name), read_spec(exported_pair(name)), root / name / form
        encoder, decoder = target / "encoder_model.onnx", target / f"{MERGED_STEM}.onnx"
        shipped = form in ("fp32", "int8")
        files = [(folder if shipped else target) / file for file in spec.files(form)]
        if not target.exists():
            target.mkdir(parents=True)
            for part, file in zip(spec.parts, () if shipped else files, strict=not shipped):
                gates = Gates(trained_pair(name), part, SETTINGS, pieces, lambda needed: pieces, seed=0)
                batches = lambda gates=gates: gates.calibration  # noqa: E731
                make_variant(form, folder / part.file("fp32"), file, batches, Calibration())
            merge(files, spec, encoder, decoder)
        return files, encoder, decoder

    return give


def loop_of_transformers_js(encoder: Path, decoder: Path, ids: list[int], spec, forced_last: int | None) -> list[int]:
    """Its `generate`, greedy: empty pasts with `use_cache_branch` false at first, then what was put out, but for the
    encoder's part, of which the first is kept."""
    encoding, decoding = (onnxruntime.InferenceSession(path) for path in (encoder, decoder))
    mask = np.ones((1, len(ids)), dtype=np.int64)
    (hidden,) = encoding.run(["last_hidden_state"], {"input_ids": np.array([ids]), "attention_mask": mask})
    names = [value.name for value in decoding.get_outputs()]
    pasts, tokens = spec.cache.empty(1) | spec.cross.empty(1), [spec.start_id]
    for step in range(NEW):
        feeds = {"input_ids": np.array([tokens[-1:]]), "encoder_attention_mask": mask, HIDDEN: hidden, **pasts}
        outputs = dict(zip(names, decoding.run(None, feeds | {USE_CACHE: np.array([step > 0])}), strict=True))
        for name, value in outputs.items():
            if name.startswith("present") and not (step and ".encoder." in name):
                pasts[name.replace("present", "past_key_values")] = value
        tokens.append(int(outputs["logits"][0, -1].argmax()))
        if forced_last is not None and step == NEW - 1:
            tokens[-1] = forced_last
        if tokens[-1] == 3:
            break
    return tokens


@pytest.mark.parametrize("name", NAMES)
def test_its_loop_writes_what_transformers_writes(name, laid_out, trained_pair):
    spec, tokenizer = read_spec(trained_pair(name)), build_tokenizer()
    model = AutoModelForSeq2SeqLM.from_pretrained(trained_pair(name), dtype=torch.float32).eval()
    _, encoder, decoder = laid_out(name, "fp32")
    written = set()
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        expected = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, num_beams=1)[0].tolist()
        written.add(tuple(expected))
        forced = model.generation_config.forced_eos_token_id
        assert loop_of_transformers_js(encoder, decoder, ids, spec, forced) == expected
    assert len(written) == len(TEXTS)
    onnx.checker.check_model(encoder, full_check=True)
    onnx.checker.check_model(decoder, full_check=True)


@pytest.mark.parametrize("form", ["fp32", "int8", "fp16", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_every_form_keeps_its_numbers(name, form, laid_out, exported_pair, documents):
    spec = read_spec(exported_pair(name))
    files, encoder, decoder = laid_out(name, form)
    prove_merged("m", spec, open_onnx_graphs(files, spec, 1), encoder, decoder, documents, 1)
    inputs = {value.name: value.shape for value in onnxruntime.InferenceSession(encoder).get_inputs()}
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert [value.name for value in onnxruntime.InferenceSession(encoder).get_outputs()] == ["last_hidden_state"]
    session = onnxruntime.InferenceSession(decoder)
    assert {value.name for value in session.get_inputs()} == {
        "input_ids", "encoder_attention_mask", HIDDEN, USE_CACHE, *spec.cache.past_names, *spec.cross.past_names
    }  # fmt: skip
    assert {value.name for value in session.get_outputs()} == {
        "logits", *spec.cache.present_names, *spec.cross.present_names
    }  # fmt: skip
    # What makes keys and values of the text is in one of the two files alone.
    before, after = (sum(path.stat().st_size for path in paths) for paths in (files, (encoder, decoder)))
    assert after < before * 1.05


def branch(graph, which):
    (node,) = [node for node in graph.node if node.op_type == "If"]
    return next(attribute.g for attribute in node.attribute if attribute.name == which)


def a_projection_is_moved(graph):
    weight = next(one for one in graph.initializer if one.name.startswith("encoded/") and len(one.dims) == 2)
    value = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(np.roll(value, 1, axis=0)), weight.name))


def keys_are_given_for_values(graph):
    first, second, *_ = branch(graph, "then_branch").node
    first.input[0], second.input[0] = second.input[0], first.input[0]


def branches_are_swapped(graph):
    (node,) = [node for node in graph.node if node.op_type == "If"]
    one, other = node.attribute
    one.name, other.name = other.name, one.name


@pytest.mark.parametrize("fault", [a_projection_is_moved, keys_are_given_for_values, branches_are_swapped])
def test_what_was_moved_wrongly_is_caught(fault, laid_out, exported_pair, documents, tmp_path):
    spec = read_spec(exported_pair("t5"))
    files, encoder, decoder = laid_out("t5", "fp32")
    model = onnx.load(decoder)
    fault(model.graph)
    onnx.save(model, tmp_path / decoder.name)
    with pytest.raises(
        GateFailed, match=r"m: (\S+ of decoder_model_merged.onnx is off|decoder_model_merged.onnx does not run)"
    ):
        prove_merged("m", spec, open_onnx_graphs(files, spec, 1), encoder, tmp_path / decoder.name, documents, 1)


def test_an_encoder_that_tells_its_decoder_more_is_refused(laid_out, exported_pair, tmp_path):
    """Keys and values that depend on the tokens themselves could not be made of hidden states."""
    spec = read_spec(exported_pair("t5"))
    files, *_ = laid_out("t5", "fp32")
    changed = shutil.copyfile(files[0], tmp_path / files[0].name)
    model = onnx.load(changed)
    maker = next(node for node in model.graph.node if "present.0.encoder.key" in node.output)
    for kind, inputs, output, extra in (
        ("Cast", ["input_ids"], "as_float", {"to": onnx.TensorProto.FLOAT}),
        ("ReduceSum", ["as_float"], "told", {"keepdims": 0}),
        ("Add", ["inner_key", "told"], "present.0.encoder.key", {}),
    ):
        model.graph.node.append(onnx.helper.make_node(kind, inputs, [output], name=f"told_{kind}", **extra))
    maker.output[:] = ["inner_key"]
    onnx.save(model, changed)
    with pytest.raises(UserError, match="told_Cast of the encoder makes keys and values of more than hidden states"):
        merge([changed, files[1]], spec, tmp_path / "encoder.onnx", tmp_path / "decoder.onnx")

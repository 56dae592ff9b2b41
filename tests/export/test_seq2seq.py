"""Encoder-decoders: two graphs past the gate, every planted fault caught, and the text that transformers makes."""

import functools
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoModelForSeq2SeqLM

from export.export import export_model
from export.gates import Gates
from export.generate import Sampling, generate
from export.io_spec import read_spec
from export.parity import check_parity
from export.runners import open_onnx, open_onnx_graphs, open_torch_pair
from export.texts import prompt_tokens, with_end
from export.verified import examine
from tests.export.conftest import MAX_LENGTH, PAIRS, build_tokenizer
from tests.export.test_parity import change, exchange, freeze, ignore_mask, rename
from trainer.__main__ import main
from trainer.config import Recipe
from trainer.errors import GateFailed
from trainer.export_config import Export, Parity

# mT5 is T5 with a gated block and a head of its own.
NAMES = ("t5", pytest.param("mt5", marks=pytest.mark.slow), "bart")
SEEDS = {"t5": 3, "bart": 1, "mt5": 3}  # of models whose texts are not one token for ever
PROMPTS = [[7, 40, 41, 9], [30], [5, 6, 7, 8, 9, 200, 201, 202, 203]]
NEW = 30
# Random weights make near-ties of all logits, so that int8 is judged here by its error alone.
SETTINGS = Export.model_validate(
    {"variants": ["fp32", "fp16", "int8"], "quality": None, "parity": {
        "int8": {"relative_rms": 0.4, "min_top1": 0.0}, "fp16": {"relative_rms": 0.05, "min_top1": 0.9}}}
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(model_folder, documents, tmp_path_factory):
    """Gives the export folder of an architecture, past the gate."""
    recipe = Recipe(run_dir=tmp_path_factory.mktemp("pairs"))
    return functools.cache(
        lambda name: export_model(recipe, SETTINGS, name, model_folder(name, SEEDS[name]), documents)
    )


@pytest.fixture(scope="module")
def gates(model_folder, documents):
    """Gives the gates of the encoder and of the decoder, by name."""

    @functools.cache
    def give(name: str) -> list[Gates]:
        folder = model_folder(name, SEEDS[name])
        parts = read_spec(folder).parts
        return [Gates(folder, part, SETTINGS, documents, lambda needed: documents, seed=0) for part in parts]

    return give


def onnx_pair(folder):
    spec = read_spec(folder)
    return open_onnx_graphs([folder / file for file in spec.files("fp32")], spec, 1)


@pytest.mark.parametrize("name", NAMES)
def test_both_graphs_pass_in_every_form(name, exported, model_folder):
    folder = exported(name)
    subject = examine(name, folder, model_folder(name, SEEDS[name]))
    assert list(subject.variants) == ["fp32", "fp16", "int8"]
    assert subject.variants["int8"].file.name == "decoder_with_past_model_quantized.onnx"
    assert subject.variants["fp16"].encoder_file == folder / "encoder_model_fp16.onnx"
    expected = {"encoder_model", "decoder_with_past_model"}
    expected = {f"{stem}{suffix}.onnx" for stem in expected for suffix in ("", "_fp16", "_quantized")}
    assert {file.name for file in folder.glob("*.onnx*")} == expected
    for what, edges in (
        ("parity_fp32", {f"2x1 after {MAX_LENGTH - 1} on 5", f"1x2 after 0 on {MAX_LENGTH}", "3x1 and 64 steps on 14"}),
        ("encoder_parity_fp32", {"1x1", f"1x{MAX_LENGTH}", "3x33"}),
    ):
        proof = next(proof for proof in subject.record["evidence"] if proof["what"] == what)
        assert edges <= {case["case"] for case in proof["cases"]}
        assert 0 < proof["metrics"]["relative_rms"] < 1e-5
    decoder = onnx.load(folder / "decoder_with_past_model.onnx").graph
    assert {node.domain for node in decoder.node} == {""}
    # Keys and values of what was encoded are put to use, not made: no weight of theirs is left in the decoder.
    assert not [
        one.name for one in decoder.initializer if "EncDecAttention.k." in one.name or "encoder_attn.k_" in one.name
    ]
    quantized = onnx.load(folder / "decoder_with_past_model_quantized.onnx").graph
    assert "MatMulInteger" in {node.op_type for node in quantized.node}


def test_cases_are_padded_and_of_all_kinds(gates):
    for _, decoder in map(gates, ("t5", "bart")):
        batches = {len(case.inputs["input_ids"]) for case in decoder.cases}
        assert {1, 7} <= batches
        masks = [case.inputs["encoder_attention_mask"] for case in decoder.cases]
        assert any(len(set(mask.sum(axis=1).tolist())) > 2 for mask in masks)
        assert all((case.inputs["input_ids"][:, 0] == decoder.spec.start_id).all()
                   for case in decoder.cases if not case.past_tokens)  # fmt: skip


def hold(gate, path, tmp_path, edit=None):
    """The gate on a graph after `edit`."""
    graph = onnx.load(path)
    if edit is not None:
        edit(graph.graph)
    edited = tmp_path / "edited.onnx"
    onnx.save(graph, edited)
    return check_parity("m fp32", gate.spec, open_onnx(edited, 1), gate.cases, gate.expected, Parity().fp32)


ENCODER_FAULTS = {
    "cross cache of two layers swapped": (
        lambda g: rename(g, exchange("present.0.encoder.{}", "present.1.encoder.{}")), "output present.0.encoder.key"
    ),
    "encoder mask ignored": (ignore_mask, "output last_hidden_state"),
}  # fmt: skip
DECODER_FAULTS = {
    "cross cache of two layers swapped": (
        lambda g: rename(g, exchange("past_key_values.0.encoder.{}", "past_key_values.1.encoder.{}")), "output logits"
    ),
    "own cache of two layers swapped": (
        lambda g: rename(g, exchange("past_key_values.0.decoder.{}", "past_key_values.1.decoder.{}")),
        "case 1x1 after 20 on 13, output logits",
    ),
    "encoder mask ignored": (lambda g: ignore_mask(g, "encoder_attention_mask"), "output logits"),
    "length of the encoded text fixed": (lambda g: freeze(g, "past_key_values.1.encoder.key", 2), "not as declared"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ENCODER_FAULTS)
def test_faults_of_the_encoder_are_caught(name, fault, exported, gates, tmp_path):
    edit, where = ENCODER_FAULTS[fault]
    with pytest.raises(GateFailed, match=where):
        hold(gates(name)[0], exported(name) / "encoder_model.onnx", tmp_path, edit)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", DECODER_FAULTS)
def test_faults_of_the_decoder_are_caught(name, fault, exported, gates, tmp_path):
    edit, where = DECODER_FAULTS[fault]
    with pytest.raises(GateFailed, match=where):
        hold(gates(name)[1], exported(name) / "decoder_with_past_model.onnx", tmp_path, edit)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("t5", "relative_attention_bias.weight"),
        pytest.param("mt5", "relative_attention_bias.weight", marks=pytest.mark.slow),
        ("bart", "embed_positions.weight"),
    ],
)
def test_positions_off_by_one_are_caught(name, table, exported, gates, tmp_path):
    for gate, file in zip(gates(name), ("encoder_model.onnx", "decoder_with_past_model.onnx"), strict=True):
        assert hold(gate, exported(name) / file, tmp_path)["metrics"]["relative_rms"] < 1e-5
        with pytest.raises(GateFailed, match="relative_rms|max_abs"):
            hold(gate, exported(name) / file, tmp_path, lambda g: change(g, table, lambda v: np.roll(v, 1, axis=0)))


def test_a_relative_position_off_by_one_is_caught(exported, gates, tmp_path):
    """T5's bias takes each new token for the one after it, as when the past is counted wrongly; the mask does not."""

    def count_one_more(graph):
        counted = next(node for node in graph.node if node.op_type == "Shape" and "past_key_values" in node.input[0]
                       and [(one.name, one.i) for one in node.attribute] == [("end", 3), ("start", 2)])  # fmt: skip
        length = next(node for node in graph.node if counted.output[0] in node.input).output[0]
        bias = [node for node in graph.node if node.op_type == "Add" and length in node.input][-1]
        bias.input[list(bias.input).index(length)] = "one_more"
        graph.initializer.append(numpy_helper.from_array(np.array(1, dtype=np.int64), "one"))
        graph.node.insert(list(graph.node).index(bias), onnx.helper.make_node("Add", [length, "one"], ["one_more"]))

    with pytest.raises(GateFailed, match="output logits: "):
        hold(gates("t5")[1], exported("t5") / "decoder_with_past_model.onnx", tmp_path, count_one_more)


def of_transformers(folder, **options):
    """New tokens of transformers' own loop on padded prompts; the start token, which it gives too, is left out."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    spec = read_spec(folder).encoder
    inputs = spec.pad([np.array(prompt) for prompt in PROMPTS], max(map(len, PROMPTS)))
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 1} | options
    ids, mask = torch.from_numpy(inputs["input_ids"]), torch.from_numpy(inputs["attention_mask"])
    return model.generate(ids, attention_mask=mask, **options)[:, 1:].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_text_is_that_of_transformers(name, exported, model_folder):
    folder = model_folder(name, SEEDS[name])
    spec = read_spec(folder)
    free = of_transformers(folder, eos_token_id=None, forced_eos_token_id=None)
    assert len({token for row in free for token in row}) > 5 and len({tuple(row) for row in free}) == 3
    ends = (free[0][3], free[1][-1])
    ended = of_transformers(folder, eos_token_id=list(ends), forced_eos_token_id=None)
    forced = of_transformers(folder, eos_token_id=ends[0], forced_bos_token_id=2, forced_eos_token_id=ends[0])
    assert {row[0] for row in forced} == {2} and forced[1][-1] == ends[0] != free[1][-1]
    for runner in (onnx_pair(exported(name)), open_torch_pair(folder, 1)):
        assert generate(runner, spec, PROMPTS, Sampling(NEW)) == free
        rows = generate(runner, spec, PROMPTS, Sampling(NEW, eos_token_ids=ends))
        assert len({len(row) for row in rows}) > 1 and padded(rows, spec) == ended
        settings = Sampling(NEW, eos_token_ids=ends[:1], forced_bos_token_id=2, forced_eos_token_id=ends[0])
        assert padded(generate(runner, spec, PROMPTS, settings), spec) == forced


def padded(rows, spec):
    longest = max(map(len, rows))
    return [row + [spec.pad_id] * (longest - len(row)) for row in rows]


def test_a_folder_says_how_its_texts_begin_and_end(model_folder):
    assert with_end(Sampling(5), model_folder("bart")).forced_eos_token_id == 3
    assert read_spec(model_folder("bart")).start_id == 3
    assert read_spec(model_folder("t5")).start_id == 0
    assert with_end(Sampling(5), model_folder("t5")).forced_eos_token_id is None


@pytest.mark.parametrize("name", PAIRS)
def test_faces(name, model_folder):
    spec = read_spec(model_folder(name))
    assert [part.stem for part in spec.parts] == ["encoder_model", "decoder_with_past_model"]
    heads = 4 if name == "bart" else 3
    assert [str(port) for port in spec.inputs[:3]] == [
        "input_ids: int64[batch_size, sequence_length]",
        "encoder_attention_mask: int64[batch_size, encoder_sequence_length]",
        f"past_key_values.0.decoder.key: float32[batch_size, {heads}, past_sequence_length, 8]",
    ]
    assert str(spec.outputs[-1]).startswith("present.1.decoder.value: ")
    assert spec.encoder is not None and len(spec.encoder.outputs) == 1 + 2 * 2
    assert spec.max_length == spec.encoder.max_length == MAX_LENGTH


def test_the_verb_runs_pairs_and_refuses_a_changed_encoder(exported, model_folder, tmp_path, capsys):
    capsys.readouterr()
    assert main(["generate", str(exported("bart")), "def", "--max-new-tokens", "9", "--json-lines"]) == 0
    of_onnx = json.loads(capsys.readouterr().out)
    folder, tokenizer = model_folder("bart", SEEDS["bart"]), build_tokenizer()
    assert main(["generate", str(folder), "def", "--max-new-tokens", "9", "--json-lines"]) == 0
    assert json.loads(capsys.readouterr().out) == of_onnx
    row = prompt_tokens(tokenizer, "def", encoded=True)
    settings = with_end(Sampling(9), folder)
    (tokens,) = generate(open_torch_pair(folder, 1), read_spec(folder), [row], settings)
    assert of_onnx["tokens"] == len(tokens)
    theirs = tokenizer.decode(tokens, skip_special_tokens=True)
    assert of_onnx["text"].replace("\ufffd", "") == theirs.replace("\ufffd", "")
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in exported("bart").iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    (changed / "encoder_model.onnx").write_bytes((changed / "encoder_model_quantized.onnx").read_bytes())
    assert main(["generate", str(changed), "def"]) == 1
    assert "is not what export left there" in capsys.readouterr().err

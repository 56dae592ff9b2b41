"""Text out of tokens: whole characters, stop strings wherever tokens divide them, and the verb that prints it."""

import io
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from export.generate import Sampling, generate
from export.io_spec import read_spec
from export.runners import open_onnx
from export.texts import GrowingText, generate_texts, not_done, prompt_tokens, stream_texts, with_end
from tests.export.conftest import SPECIAL, build_tokenizer
from trainer.__main__ import main
from trainer.errors import UserError

PROMPTS = ["def add(", "class", "x = 0\n    y = 1\n"]
MANY = [*PROMPTS, "self", "y =", "Point:", "add(first)", "second, first", "1 + 1", "return x", "class Point:\n    "]
NEW = 40
SEED = 1  # a tiny GPT-2 whose text does not end in one token for ever


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def pieces(tokenizer, text, stops=(), prompt="x = 0"):
    """What is given out token by token, and the text in the end."""
    growing = GrowingText(tokenizer, prompt_tokens(tokenizer, prompt), stops, ends=[3])
    given = [growing.take(token) for token in tokenizer(text)["input_ids"]]
    return [*given, growing.close()], growing


def test_characters_come_whole(tokenizer):
    text = " añ 日本語 😀 → def"
    given, growing = pieces(tokenizer, text)
    assert "".join(given) == growing.text == text
    assert any(len(tokenizer(letter)["input_ids"]) > 2 for letter in text), "the tokens must divide characters"
    assert given.count("") > 10 and not any("\ufffd" in piece for piece in given)
    assert {"日", "本", "語", "😀"} <= set(given)


def test_bytes_that_are_no_character_are_neither_waited_for_nor_shown_at_the_end(tokenizer):
    letters = tokenizer("é")["input_ids"]
    growing = GrowingText(tokenizer, [40], (), ends=[])
    given = [growing.take(token) for token in [letters[0]] * 5 + tokenizer("ab")["input_ids"] + letters[:1]]
    assert given[:3] == [""] * 3 and given[3:5] == ["\ufffd"] * 2  # four bytes are no character of which the first is
    assert given[5] == "\ufffd" * 3 + "a" and growing.close() == "" and growing.text == "\ufffd" * 5 + "ab"


def test_a_stop_string_is_found_across_tokens_and_left_out(tokenizer):
    for text, stop, expected in (
        ("first + second", "t + s", "firs"),
        ("日本語", "本", "日"),
        ("aaab", "aab", "a"),
        ("add add\n\nclass", "\n\n", "add add"),
    ):
        given, growing = pieces(tokenizer, text, (stop,))
        assert growing.text == "".join(given) == expected
        assert growing.ended_by == "string" and given[-1] == ""
        assert len(growing.tokens) < len(tokenizer(text + "zz")["input_ids"])


def test_what_may_begin_a_stop_string_is_held_back_until_it_does_not(tokenizer):
    given, growing = pieces(tokenizer, "zENzEN", ("END",))
    assert [piece for piece in given if piece] == ["z", "ENz", "EN"]  # the last when no more tokens come
    assert growing.ended_by == ""


def test_stop_strings_against_a_search_in_the_whole_text(tokenizer):
    random = np.random.default_rng(0)
    stopped = 0
    for _ in range(300):
        text = "".join(random.choice(list("abé"), size=12))
        stop = "".join(random.choice(list("abé"), size=random.integers(1, 4)))
        given, growing = pieces(tokenizer, text, (stop,))
        assert growing.text == "".join(given) == text.partition(stop)[0]
        stopped += growing.ended_by == "string"
    assert 100 < stopped < 300


def test_the_prompt_is_no_part_of_what_is_searched(tokenizer):
    _, growing = pieces(tokenizer, "lass Point", ("class",), prompt="c")
    assert growing.text == "lass Point"


def test_rows_end_at_stop_strings_as_in_transformers(model_folder, raw_graph, tokenizer):
    """Tokens are those of transformers' `stop_strings`, on stops that two tokens hold together."""
    folder, runner = model_folder("gpt2", SEED), open_onnx(raw_graph("gpt2", SEED), 1)
    spec = read_spec(folder)
    rows = [prompt_tokens(tokenizer, prompt) for prompt in MANY]
    written = zip(MANY, rows, generate(runner, spec, rows, Sampling(NEW)), strict=True)
    # Special tokens are no part of our text, but of the one that transformers searches.
    kept = [each for each in written if min(each[2]) >= len(SPECIAL)][:4]
    prompts, rows, free = ([each[index] for each in kept] for index in range(3))
    stops = [across for row in free if (across := divided_string(tokenizer, row))]
    assert len(kept) >= 3 and len(stops) >= 2
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    padded = spec.pad([np.array(row) for row in rows], max(map(len, rows)), left=True)
    ids, mask = torch.from_numpy(padded["input_ids"]), torch.from_numpy(padded["attention_mask"])
    # Without an end token, which here no row has, rows that have ended would go on until all have.
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    theirs = model.generate(ids, attention_mask=mask, stop_strings=stops, tokenizer=tokenizer, **options)
    expected = theirs[:, ids.shape[1] :].tolist()
    texts = generate_texts(runner, spec, tokenizer, prompts, Sampling(NEW), stops)
    for text, row, all_tokens in zip(texts, expected, free, strict=True):
        assert text.tokens + [0] * (len(row) - len(text.tokens)) == row
        # Bytes that are no character, of which random weights make many, are marked singly or in runs.
        whole = tokenizer.decode(all_tokens).replace("\ufffd", "")
        cut = min(whole.find(stop) % (len(whole) + 1) for stop in stops)
        assert text.text.replace("\ufffd", "") == whole[:cut]
    assert sum(text.ended_by == "string" for text in texts) >= 2
    assert len({len(text.tokens) for text in texts}) > 1


def divided_string(tokenizer, tokens):
    """The first two characters of plain text that lie in two tokens which follow each other."""
    for first, second in itertools.pairwise(tokens[4:]):
        one, two = (tokenizer.decode([token]) for token in (first, second))
        if (one + two).isascii() and (one + two).isprintable() and one != two:
            return one[-1] + two[0]
    return None


def test_a_special_token_as_stop_string_ends_as_a_token(model_folder, raw_graph, tokenizer):
    folder, runner = model_folder("gpt2", SEED), open_onnx(raw_graph("gpt2", SEED), 1)
    spec = read_spec(folder)
    for seed in range(50):  # until a special token is drawn
        random = Sampling(20, temperature=50.0, seed=seed)
        *_, (text,) = stream_texts(runner, spec, tokenizer, PROMPTS[:1], random)
        if any(token < 5 for token in text.tokens[1:]):
            break
    special = next(token for token in text.tokens if token < 5)
    marked = tokenizer.convert_ids_to_tokens(special)
    (ended,) = generate_texts(runner, spec, tokenizer, PROMPTS[:1], random, [marked])
    assert ended.ended_by == "token" and ended.tokens[-1] == special
    assert ended.tokens == text.tokens[: len(ended.tokens)]
    with pytest.raises(UserError, match="a stop string is empty"):
        generate_texts(runner, spec, tokenizer, PROMPTS, random, [""])


def test_prompts_begin_as_the_tokenizer_says_and_do_not_end(tokenizer):
    """A tokenizer that puts tokens around a text, as BERT's and T5's do, would end the prompt."""
    around = build_tokenizer()
    around.backend_tokenizer.post_processor = _around()
    plain = tokenizer("add")["input_ids"]
    assert around("add")["input_ids"] == [2, *plain, 3]
    assert prompt_tokens(around, "add") == plain
    around.bos_token = "[CLS]"
    assert prompt_tokens(around, "add") == [2, *plain]


def _around():
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])


def test_end_tokens_are_those_of_the_folder(model_folder, tmp_path):
    settings = Sampling(7, temperature=0.5)
    assert with_end(settings, model_folder("gpt2")) == Sampling(7, temperature=0.5, eos_token_ids=(3,))
    shutil.copy(model_folder("gpt2") / "config.json", tmp_path)
    assert with_end(settings, tmp_path).eos_token_ids == (3,)
    named = {"eos_token_id": [5, 6], "forced_bos_token_id": 8, "forced_eos_token_id": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps(named))
    assert not_done(tmp_path) == []
    (tmp_path / "generation_config.json").write_text(json.dumps(named | {"num_beams": 4, "min_length": 0}))
    assert not_done(tmp_path) == ["num_beams=4"]
    found = with_end(settings, tmp_path)
    assert (found.eos_token_ids, found.forced_bos_token_id, found.forced_eos_token_id) == ((5, 6), 8, 5)


def test_the_verb_writes_what_the_model_says(exported_folder, model_folder, tokenizer, capsys, monkeypatch):
    folder = exported_folder("gpt2")
    (expected,) = generate_texts(
        open_onnx(folder / "model.onnx", 1), read_spec(folder), tokenizer, ["def"], Sampling(9, eos_token_ids=(3,))
    )
    capsys.readouterr()
    assert main(["generate", str(folder), "--max-new-tokens", "9", "def", "def"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{expected.text}\n" * 2 and expected.text
    assert "model.onnx, which passed parity; also: ['fp32', 'int8']" in said.err
    monkeypatch.setattr("sys.stdin", io.StringIO("def\n\n   \ndef\r\n"))
    assert main(["generate", str(model_folder("gpt2")), "--json-lines", "--max-new-tokens", "9"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    about = {"prompt": "def", "text": expected.text, "tokens": 9, "ended_by": "max_new_tokens"}
    assert lines == [about, about]
    stop = expected.text[1:3]
    assert main(["generate", str(folder), "def", "--max-new-tokens", "9", "--stop", stop, "--variant", "int8"]) == 0
    said = capsys.readouterr()
    assert stop not in said.out and "model_quantized.onnx" in said.err


def test_the_verb_runs_only_what_passed_the_gate(exported_folder, model_folder, tmp_path, capsys):
    changed = tmp_path / "changed"
    shutil.copytree(exported_folder("gpt2"), changed)
    shutil.copy(changed / "model.onnx", changed / "model_quantized.onnx")
    gpt2 = str(exported_folder("gpt2"))
    capsys.readouterr()
    cases = [
        ([str(changed), "a"], 1, "is not what export left there"),
        (
            [gpt2, "a", "--variant", "fp16"],
            2,
            "has no verified fp16\nNeeded: one of fp32, int8",
        ),
        ([str(model_folder("gpt2")), "a", "--variant", "int8"], 2, "is a model folder, which has no int8"),
        ([str(tmp_path / "nothing"), "a"], 2, "is not there or not finished"),
        ([str(model_folder("bert")), "a"], 2, "BertForMaskedLM does not generate text"),
        ([gpt2, ""], 2, "a prompt is empty"),
        ([gpt2, "a", "--max-new-tokens", "99"], 2, "at most 72 in all"),
        ([str(tmp_path / "nothing"), "a", "--top-p", "0"], 2, "top_p in (0, 1]"),
    ]
    for words, code, message in cases:
        assert main(["generate", *words]) == code, words
        said = capsys.readouterr()
        assert message in said.err and said.out == "" and "Traceback" not in said.err

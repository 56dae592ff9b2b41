"""Tokenizers: the same bytes on every run, what transformers gives back, and loaded ones against their originals."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer

from trainer.config import Tokenizer as TokenizerConfig
from trainer.data.tokenizer import (
    TokenizerQuality,
    encode,
    encoding_backend,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from trainer.errors import UserError

KINDS = ["wordpiece", "byte_level_bpe", "unigram", "character"]
ROBERTA_IDS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
BERT_IDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
HARD_TEXT = "  Zwei\n\n\tfoo_bar(x)=12  <s> [MASK] </s>\u3000ende. 'I'll' \n"

# Words of random letters have many equally frequent pairs and pieces: ties, where an unstable order would show.
SCRIPT = """
import random, sys
from pathlib import Path
from trainer.config import Tokenizer
from trainer.data.tokenizer import save_tokenizer, train_tokenizer
letters = random.Random(0)
words = ["".join(letters.choices("abcdefghij\\u00e4\\u6771XYZ.", k=letters.randint(1, 8))) for _ in range(600)]
texts = [" ".join(letters.choices(words, k=40)) for _ in range(100)]
for kind in ("wordpiece", "byte_level_bpe", "unigram", "character"):
    config = Tokenizer(type=kind, **({} if kind == "character" else {"vocab_size": 400}))
    save_tokenizer(train_tokenizer(config, lambda: iter(texts)), Path(sys.argv[1], kind))
"""


def corpus(count: int = 60) -> list[str]:
    words = ["the", "cat", "sat", "on", "mat", "Zwei", "foo_bar(x)", "=", "12", "ende.", "'I'll'", "naïve", "café"]
    words += ["a", "and", "ende", "東京", "\n\t", "\u3000"]
    choose = random.Random(0)
    return [" ".join(choose.choices(words, k=50)) for _ in range(count)]


def trained(kind: str, **keys):
    return train_tokenizer(TokenizerConfig(type=kind, **{**sized(kind, 330), **keys}), lambda: iter(corpus()))


def sized(kind: str, entries: int) -> dict[str, int]:
    return {} if kind == "character" else {"vocab_size": entries}


def ids(tokenizer, text: str) -> list[int]:
    [(_, found)] = encode(encoding_backend(tokenizer), [text])
    return found


# ---- trained ---------------------------------------------------------------------------------------------------


def test_training_twice_gives_the_same_files(tmp_path):
    for run, environment in enumerate(
        [{"PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "1"}, {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "4"}, {}]
    ):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / str(run))]
        subprocess.run(command, env=os.environ | environment, check=True, cwd=Path(__file__).parents[3])
    for path in sorted((tmp_path / "0").rglob("*.json")):
        for run in ("1", "2"):
            assert path.read_bytes() == (tmp_path / run / path.relative_to(tmp_path / "0")).read_bytes(), path.name
    assert {path.parent.name for path in (tmp_path / "0").rglob("tokenizer.json")} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizer_opens_in_transformers(tmp_path, kind):
    tokenizer = trained(kind)
    save_tokenizer(tokenizer, tmp_path)
    # A model folder has a config.json; transformers then looks whether the tokenizer fits the model's type.
    for model_type in (None, "bert", "roberta", "gpt2", "llama", "modernbert", "distilbert"):
        if model_type:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
        assert again(HARD_TEXT)["input_ids"] == tokenizer(HARD_TEXT)["input_ids"], model_type
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert set(again("the cat")) == {"input_ids", "attention_mask"}


def test_special_tokens_of_wordpiece():
    tokenizer = trained("wordpiece")
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens} == BERT_IDS
    assert tokenizer.eos_token_id is None and tokenizer.bos_token_id is None
    encoded = tokenizer("the cat", "sat")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(encoded) == ["[CLS]", "the", "cat", "[SEP]", "sat", "[SEP]"]
    assert tokenizer.decode(encoded, skip_special_tokens=True) == "the cat sat"


@pytest.mark.parametrize("kind", KINDS[1:])
def test_special_tokens_of_the_others(kind):
    tokenizer = trained(kind)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens} == ROBERTA_IDS
    roles = (tokenizer.bos_token, tokenizer.cls_token, tokenizer.eos_token, tokenizer.sep_token)
    assert roles == ("<s>", "<s>", "</s>", "</s>")
    assert not set(tokenizer("the cat")["input_ids"]) & set(ROBERTA_IDS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_written_in_a_text_are_text(kind):
    tokenizer = trained(kind)
    specials = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    text = " ".join(tokenizer.all_special_tokens)
    assert specials & set(tokenizer(text, add_special_tokens=False)["input_ids"])  # what would happen otherwise
    assert not specials & set(ids(tokenizer, text))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_lossless_kinds_give_the_text_back(kind):
    tokenizer = train_tokenizer(
        TokenizerConfig(type=kind, **sized(kind, 400)), lambda: iter([*corpus(), HARD_TEXT * 30, "<s>[MASK]/" * 30])
    )
    assert tokenizer.decode(ids(tokenizer, HARD_TEXT)) == HARD_TEXT


def test_byte_level_knows_every_text():
    text = "never seen: ЖЗИ 😀 \x00\x07 \u200b"
    tokenizer = trained("byte_level_bpe")
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_character_is_one_token_a_character():
    tokenizer = trained("character")
    assert len(tokenizer) == len(set("".join(corpus()))) + 5
    assert len(ids(tokenizer, "the 東京\n")) == 7
    assert ids(tokenizer, "ЖЗ") == [ROBERTA_IDS["<unk>"]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_lowercase_folds_case_and_accents(kind):
    folding, keeping = (trained(kind, lowercase=lowercase) for lowercase in (True, False))
    assert ids(folding, "NaÏve CAFÉ") == ids(folding, "naive cafe")
    assert ids(keeping, "naïve") != ids(keeping, "naive")


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
@pytest.mark.parametrize("vocab_size", [16, 40, 80])
def test_small_vocabularies_keep_their_size(kind, vocab_size):
    tokenizer = trained(kind, vocab_size=vocab_size)
    assert 6 < len(tokenizer) <= vocab_size


def test_rare_characters_do_not_fill_the_vocabulary():
    texts = ["the cat sat on the mat " * 200, "".join(chr(0x4E00 + number) for number in range(3000))]
    config = TokenizerConfig(type="wordpiece", vocab_size=200)
    tokenizer = train_tokenizer(config, lambda: iter(texts))
    assert len(tokenizer) <= 200 and len(ids(tokenizer, "the cat")) == 2


def test_impossible_vocabularies_are_errors():
    with pytest.raises(UserError, match="at least 261"):
        trained("byte_level_bpe", vocab_size=260)
    for kind in ("wordpiece", "unigram", "character"):
        with pytest.raises(UserError, match="only special tokens"):
            train_tokenizer(TokenizerConfig(type=kind), lambda: iter([""]))


# ---- loaded ----------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_loads_as_folder_and_as_file(tmp_path):
    for kind in KINDS:
        tokenizer = trained(kind)
        save_tokenizer(tokenizer, tmp_path / kind)
        for path in (tmp_path / kind, tmp_path / kind / "tokenizer.json"):
            loaded = load_tokenizer(TokenizerConfig(path=path))
            assert loaded(HARD_TEXT)["input_ids"] == tokenizer(HARD_TEXT)["input_ids"]
            assert loaded.special_tokens_map == tokenizer.special_tokens_map


def test_wrong_vocabularies_are_named(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nthe\ncat\n")
    with pytest.raises(UserError, match=r"vocab\.txt: id 5"):
        load_tokenizer(TokenizerConfig(path=path))
    path.write_text("[PAD]\n[UNK]\nthe\n")
    with pytest.raises(UserError, match=r"\[CLS\], \[SEP\], \[MASK\]"):
        load_tokenizer(TokenizerConfig(path=path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be opened"):
        load_tokenizer(TokenizerConfig(path=tmp_path / "tokenizer.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(TokenizerConfig(path=tmp_path / "empty"))
    with pytest.raises(UserError, match="is not there"):
        load_tokenizer(TokenizerConfig(path=tmp_path / "nothing"))
    with pytest.raises(UserError, match="lowercase is set"):
        load_tokenizer(TokenizerConfig(path=tmp_path / "tokenizer.json", lowercase=True))


def test_truncation_in_a_loaded_file_cuts_no_document(tmp_path):
    tokenizer = trained("byte_level_bpe")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(TokenizerConfig(path=tmp_path / "tokenizer.json"))
    assert loaded.decode(ids(loaded, HARD_TEXT)) == HARD_TEXT


@pytest.mark.parametrize("case", ["cased", "uncased"])
def test_bert_vocabulary_tokenizes_as_bert(shared_data, tmp_path, case):
    path = shared_data / "tokenizers" / f"bert-base-{case}-vocab.txt"
    loaded = load_tokenizer(TokenizerConfig(path=path, lowercase=case == "uncased"))
    original = BertTokenizer(str(path), do_lower_case=case == "uncased")
    lines = [line for line in (shared_data / "wikitext-2" / "valid.txt").read_text().split("\n") if line.strip()]
    lines += ["Ünïcode, 東京 😀\u200b\x00 [x] don't"]
    assert len(lines) > 2000
    assert loaded(lines)["input_ids"] == original(lines)["input_ids"]
    save_tokenizer(loaded, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(lines[:50])["input_ids"] == original(lines[:50])["input_ids"]


def test_gpt2_loads_from_each_of_its_forms(shared_data, tmp_path):
    folder = shared_data / "tokenizers"
    shutil.copy(folder / "gpt2-vocab.json", tmp_path / "vocab.json")
    shutil.copy(folder / "gpt2-merges.txt", tmp_path / "merges.txt")
    original = GPT2Tokenizer.from_pretrained(tmp_path)
    lines = (shared_data / "wikitext-2" / "valid.txt").read_text().split("\n")[:500]
    lines.append(HARD_TEXT)
    for path in (folder / "gpt2-tokenizer.json", tmp_path):
        loaded = load_tokenizer(TokenizerConfig(path=path))
        assert loaded(lines)["input_ids"] == original(lines)["input_ids"]
        assert loaded.decode(ids(loaded, HARD_TEXT)) == HARD_TEXT
        assert (loaded.eos_token, loaded.bos_token, loaded.pad_token) == ("<|endoftext|>", "<|endoftext|>", None)
        assert len(loaded) == 50257


def test_quality_counts_words_bytes_and_unknown_tokens():
    quality = TokenizerQuality(unknown_id=1)
    quality.add("two wörds", [5, 1, 6])
    quality.add("one", [7])
    assert quality.metrics() == {
        "fertility_tokens_per_word": pytest.approx(4 / 3),
        "bytes_per_token": pytest.approx(13 / 4),
        "unknown_rate": pytest.approx(1 / 4),
    }

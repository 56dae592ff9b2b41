"""Sources: every format and compression, every kind of damage, found files, and the split."""

import bz2
import gzip
import json
import lzma
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from trainer.config import Prepare, Source
from trainer.data import bytestream
from trainer.data.corpus import Corpus, collect
from trainer.data.files import find_files
from trainer.data.journal import Journal
from trainer.data.sources import BadDocument, Document, read_file
from trainer.errors import UserError
from trainer.recipe_file import recipe_hash

COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}


def read(source: Source) -> list[Document | BadDocument]:
    return [document for path in find_files(source) for document in read_file(source, path)]


def texts(source: Source) -> list[str]:
    found = read(source)
    assert all(isinstance(document, Document) for document in found), found
    return [document.utf8.decode() for document in found if isinstance(document, Document)]


def bad(source: Source) -> list[tuple[str, str]]:
    return [(found.reason, found.where) for found in read(source) if isinstance(found, BadDocument)]


def text_source(*paths: Path, **keys) -> Source:
    return Source(type="text", paths=tuple(map(str, paths)), **keys)


def corpus_of(tmp_path: Path, *sources: Source, **keys) -> Corpus:
    keys = {"validation_fraction": 0.3, **keys}
    prepare = Prepare(sources=sources, tokenizer={"type": "character"}, **keys)
    journal = Journal(tmp_path / "work", {"recipe": recipe_hash(prepare)})
    return collect(prepare, tmp_path / "work" / "spool", journal)


def lines_file(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ---- text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_compressed_text_is_the_plain_text(tmp_path, suffix):
    words = random.Random(0)
    lines = [str(words.getrandbits(200)) for _ in range(5000)]  # longer than one block of input, hard to compress
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS.get(suffix, bytes)("\n".join(lines).encode()))
    assert texts(text_source(path, document="line")) == lines
    assert texts(text_source(path)) == ["\n".join(lines)]


@pytest.mark.parametrize("suffix", list(COMPRESS))
def test_concatenated_streams_are_read_to_the_end(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"one\n") + COMPRESS[suffix](b"two\n"))
    assert texts(text_source(path, document="line")) == ["one", "two"]


def test_zero_padding_behind_a_stream_is_allowed(tmp_path):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"one\n") + bytes(8))
    assert texts(text_source(path, document="line")) == ["one"]


@pytest.mark.parametrize("suffix", list(COMPRESS))
@pytest.mark.parametrize("keep", [0.6, 0.999])
def test_truncated_file_gives_what_comes_before(tmp_path, suffix, keep):
    words = random.Random(1)
    lines = [str(words.getrandbits(400)) for _ in range(20_000)]
    whole = COMPRESS[suffix]("\n".join(lines).encode())
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(whole[: int(len(whole) * keep)])
    found = read(text_source(path, document="line"))
    last = found.pop()
    assert isinstance(last, BadDocument) and (last.reason, last.where) == ("truncated_file", str(path))
    got = [document.utf8.decode() for document in found if isinstance(document, Document)]
    assert got == lines[: len(got)] and 0.3 * len(lines) < len(got) < len(lines)


@pytest.mark.parametrize("suffix", list(COMPRESS))
def test_damaged_file_is_noticed(tmp_path, suffix):
    words = random.Random(2)
    whole = bytearray(COMPRESS[suffix](words.randbytes(200_000).hex().encode()))
    whole[len(whole) // 2 : len(whole) // 2 + 64] = bytes(64)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(whole)
    if suffix == ".zst":  # zstd.compress writes no checksum, so that damage can end as other characters
        assert texts(text_source(path)) != [words.randbytes(200_000).hex()]
        path.write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    assert bad(text_source(path)) == [("corrupt_file", str(path))]


def test_garbage_behind_a_stream_is_noticed(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one\n") + b"garbage")
    assert bad(text_source(path, document="line")) == [("corrupt_file", str(path))]


def test_newlines_and_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\r\n  \r\nfour\r\n")
    assert texts(text_source(path)) == ["one\ntwo\nthree\n\n  \nfour\n"]
    assert texts(text_source(path, document="line")) == ["one", "two\nthree", "four"]
    assert texts(text_source(path, document="block")) == ["one\ntwo\nthree", "four"]


def test_byte_order_mark_in_pieces_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(bytestream, "_BLOCK_BYTES", 1)
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo")
    assert texts(text_source(path, document="line")) == ["one", "two"]
    path.write_bytes(b"ab")
    assert texts(text_source(path)) == ["ab"]


@pytest.mark.parametrize(("document", "good"), [("file", []), ("line", ["good", "last"]), ("block", ["last"])])
def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path, document, good):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\ncaf\xe9\n\nlast\n")
    source = text_source(path, document=document)
    assert bad(source) == [("not_utf8", f"{path}:2")]
    assert [found.utf8.decode() for found in read(source) if isinstance(found, Document)] == good


# ---- jsonl and parquet -----------------------------------------------------------------------------------------

BAD_JSON = {
    '{"text": "cut': "not_json",
    "[" * 100_000: "not_json",
    '"only a string"': "no_text_field",
    '{"content": "x"}': "no_text_field",
    '{"text": null}': "text_not_string",
    '{"text": 5}': "text_not_string",
    '{"text": "\\ud83d"}': "not_unicode",
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    rows = [{"text": "one\r\ntwo"}, {"text": "Ä 東京 😀", "meta": {"x": 1}}]
    content = "\n\n".join(json.dumps(row) for row in rows) + "\n"
    path.write_bytes(COMPRESS.get(suffix, bytes)(b"\xef\xbb\xbf" + content.encode()))
    assert texts(Source(type="jsonl", paths=(str(tmp_path),))) == ["one\ntwo", "Ä 東京 😀"]


def test_bad_jsonl_lines_are_named_with_reason_and_line(tmp_path):
    path = lines_file(tmp_path / "a.jsonl", ['{"text": "good"}', *BAD_JSON, '{"text": "good too"}'])
    source = Source(type="jsonl", paths=(str(path),))
    assert bad(source) == [(reason, f"{path}:{line}") for line, reason in enumerate(BAD_JSON.values(), start=2)]
    assert sum(isinstance(found, Document) for found in read(source)) == 2


def test_parquet(tmp_path):
    values = [f"text {number}" for number in range(3000)]
    pyarrow.parquet.write_table(pyarrow.table({"body": values, "id": range(3000)}), tmp_path / "a.parquet")
    (tmp_path / "_SUCCESS").touch()
    assert texts(Source(type="parquet", paths=(str(tmp_path),), text_field="body")) == values


def test_bad_parquet_rows_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    assert bad(Source(type="parquet", paths=(str(path),))) == [("text_not_string", f"{path}: row 2")]
    assert bad(Source(type="parquet", paths=(str(path),), text_field="body")) == [("no_text_field", str(path))]


def test_truncated_parquet_is_noticed(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert bad(Source(type="parquet", paths=(str(path),))) == [("not_parquet", str(path))]


# ---- files -----------------------------------------------------------------------------------------------------


def test_folders_are_searched_and_files_sorted_and_taken_once(tmp_path):
    for name in ("b/z.txt", "a/y.txt", "a/x.txt.gz", ".git/config", "a/.hidden", "literal[1].txt", "literal1.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    every = [tmp_path / name for name in ("a/x.txt.gz", "a/y.txt", "b/z.txt", "literal1.txt", "literal[1].txt")]
    assert find_files(text_source(tmp_path, tmp_path / "b" / "*.txt")) == every
    assert find_files(text_source(tmp_path / "**" / "y.*")) == [tmp_path / "a/y.txt"]
    assert find_files(text_source(tmp_path / "literal[1].txt")) == [tmp_path / "literal[1].txt"]


@pytest.mark.parametrize("missing", ["nothing.txt", "*.nothing", "empty"])
def test_a_path_that_gives_no_file_is_named(tmp_path, missing):
    (tmp_path / "empty").mkdir()
    here = lines_file(tmp_path / "a.txt", ["x"])
    with pytest.raises(UserError, match=re.escape(missing)):
        find_files(text_source(here, tmp_path / missing))


def test_links_are_followed_and_each_file_is_taken_once(tmp_path):
    """A linked folder, a linked file, a loop, and two ways to one folder."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "sub", outside / "deep"):
        folder.mkdir(parents=True)
    lines_file(outside / "deep" / "a.txt", ["a"])
    lines_file(outside / "b.txt", ["b"])
    lines_file(root / "sub" / "c.txt", ["c"])
    (root / "linked").symlink_to(outside)
    (root / "also").symlink_to(outside)
    (root / "sub" / "loop").symlink_to(root)
    (root / "file.txt").symlink_to(root / "sub" / "c.txt")
    every = [root / "also/b.txt", root / "also/deep/a.txt", root / "file.txt"]
    assert find_files(text_source(root)) == every
    assert sorted(texts(text_source(root))) == ["a\n", "b\n", "c\n"]
    assert len(find_files(text_source(f"{root}/**/*.txt"))) == 3


def test_a_link_to_nothing_is_a_bad_document(tmp_path):
    lines_file(tmp_path / "a.txt", ["here"])
    for name in ("folder", "z.txt"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    wanted = [("dangling_link", str(tmp_path / name)) for name in ("folder", "self", "z.txt")]
    for source in (text_source(tmp_path), text_source(tmp_path / "*"), text_source(*sorted(tmp_path.iterdir()))):
        assert bad(source) == wanted
    with pytest.raises(UserError, match=r"z.txt: a link to .*gone, which is not there"):
        corpus_of(tmp_path / "one", text_source(tmp_path / "z.txt"))
    skipping = text_source(tmp_path, on_bad_document="skip")
    train = text_source(lines_file(tmp_path / "more", ["x", "y"]), document="line", split="train")
    corpus = corpus_of(tmp_path / "two", skipping.model_copy(update={"split": "validation"}), train)
    assert dict(corpus.sources[0].dropped)["dangling_link"] == 3


@pytest.mark.parametrize("name", ["notes.zip.txt", "a.tar.txt", "b.rar.jsonl", "c.7z.gz"])
def test_only_the_last_suffix_makes_an_archive(tmp_path, name):
    (tmp_path / name).touch()
    assert find_files(text_source(tmp_path / name)) == [tmp_path / name]


@pytest.mark.parametrize("name", ["a.tar.xz", "a.tar.zst", "a.tar", "a.tgz", "a.txt.zip", "A.ZIP"])
def test_archives_are_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="unpack"):
        find_files(text_source(tmp_path))


def test_stdlib_is_read_by_pythons_own_rule(tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "foreign.py").write_text("foreign")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n'\xe9'\n")
    (tmp_path / "utf8.py").write_bytes(b"\xef\xbb\xbf'\xc3\xa9'\n")
    (tmp_path / "wrong.py").write_bytes(b"'\xe9'\n")
    (tmp_path / "unknown.py").write_bytes(b"# coding: nothing\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    source = Source(type="stdlib")
    found = {Path(document.where).name: document for document in read(source)}
    assert {name: d.utf8.decode() for name, d in found.items() if isinstance(d, Document)} == {
        "latin.py": "# -*- coding: latin-1 -*-\n'é'\n",
        "utf8.py": "'é'\n",
    }
    assert {name for name, d in found.items() if isinstance(d, BadDocument)} == {"wrong.py", "unknown.py"}


def test_the_real_stdlib_is_there():
    found = read(Source(type="stdlib"))
    assert sum(isinstance(document, Document) for document in found) > 500
    assert sum(isinstance(document, BadDocument) for document in found) < 20


# ---- keeping, dropping, splitting ------------------------------------------------------------------------------


def all_texts(corpus: Corpus) -> dict[str, list[str]]:
    sources = range(len(corpus.sources))
    return {split: [text for i in sources for text in corpus.texts(split, i)] for split in ("train", "validation")}


def test_drops_are_counted_and_the_first_of_equal_documents_is_kept(tmp_path):
    numbers = [f"document {number}" for number in range(50)]
    first = text_source(lines_file(tmp_path / "a", ["x", *numbers, numbers[3]]), document="line")
    second = text_source(lines_file(tmp_path / "b", [numbers[7], "new one"]), document="line", split="validation")
    corpus = corpus_of(tmp_path, first, second, min_document_characters=3)
    assert [(s.documents_read, s.documents_kept, dict(s.dropped)) for s in corpus.sources] == [
        (52, 50, {"too_short": 1, "duplicate": 1}),
        (2, 1, {"duplicate": 1}),
    ]
    found = all_texts(corpus)
    assert sorted(found["train"] + found["validation"]) == sorted([*numbers, "new one"])
    assert "new one" in found["validation"] and len(found["validation"]) > 5


def test_duplicates_stay_where_the_recipe_wants_them(tmp_path):
    source = text_source(lines_file(tmp_path / "a", ["same"] * 3), document="line", split="train")
    other = text_source(lines_file(tmp_path / "b", ["other"]), document="line", split="validation")
    assert all_texts(corpus_of(tmp_path, source, other, deduplicate=False))["train"] == ["same"] * 3


def test_more_data_moves_no_document_to_another_split(tmp_path):
    def splits(name: str, lines: list[str], fraction: float) -> dict[str, set[str]]:
        (tmp_path / name).mkdir()
        source = text_source(lines_file(tmp_path / name / "a", lines), document="line")
        found = all_texts(corpus_of(tmp_path / name, source, validation_fraction=fraction))
        return {split: set(texts) for split, texts in found.items()}

    lines = [f"document {number}" for number in range(400)]
    small = splits("small", lines[100:300], 0.2)
    large = splits("large", lines, 0.2)
    assert small["train"] < large["train"] and small["validation"] < large["validation"]
    assert 0.12 < len(large["validation"]) / 400 < 0.28
    assert large["validation"] < splits("more", lines, 0.4)["validation"]


def test_a_bad_document_stops_or_is_counted(tmp_path):
    good = [json.dumps({"text": f"document {number}"}) for number in range(40)]
    path = lines_file(tmp_path / "a.jsonl", [*good, "{"])
    with pytest.raises(UserError, match=re.escape(f"{path}:41")):
        corpus_of(tmp_path / "one", Source(type="jsonl", paths=(str(path),)))
    corpus = corpus_of(tmp_path / "two", Source(type="jsonl", paths=(str(path),), on_bad_document="skip"))
    assert (corpus.sources[0].documents_kept, dict(corpus.sources[0].dropped)) == (40, {"not_json": 1})


def test_an_empty_split_is_an_error_that_says_what_was_dropped(tmp_path):
    path = lines_file(tmp_path / "a", ["x", "long enough"])
    with pytest.raises(UserError, match=r"no validation documents.*1 too_short"):
        corpus_of(tmp_path, text_source(path, document="line", split="train"), min_document_characters=5)


def test_equal_source_names_are_refused(tmp_path):
    path = lines_file(tmp_path / "a", ["x"])
    with pytest.raises(UserError, match="'text-2'"):
        corpus_of(tmp_path, text_source(path, name="text-2"), text_source(path))


@pytest.mark.parametrize("limit", [1, 100, 1001, 10**6])
def test_training_text_is_limited_and_chosen_by_hash(tmp_path, limit):
    lines = [f"dökument {number}" for number in range(500)]
    corpus = corpus_of(tmp_path, text_source(lines_file(tmp_path / "a", lines), document="line"))
    train = list(corpus.texts("train", 0))
    chosen = list(corpus.training_texts(limit))
    whole = sum(len(text.encode()) for text in train)
    taken = sum(len(text.encode()) for text in chosen)
    assert min(limit, whole) - 1 <= taken <= limit  # a cut inside a character drops it
    if limit == 1001:
        positions = [train.index(text) for text in chosen if text in train]
        assert positions == sorted(positions) and positions[-1] > len(train) / 2  # spread, not the first ones

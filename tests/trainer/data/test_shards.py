"""Token shards: what is written is read, in Megatron's bytes, and every cut or foreign file is named."""

import json
import re
import struct

import numpy as np
import pytest

from trainer.artifact import write_artifact
from trainer.data.shards import MANIFEST_FILE, ShardWriter, TokenShards, open_shard
from trainer.errors import UserError


def write(folder, documents_by_source, vocab_size=1000, max_shard_tokens=50):
    """A folder as prepare writes it, with only a training split."""
    shards = []
    for source, documents in documents_by_source.items():
        writer = ShardWriter(folder / "train", source, vocab_size, max_shard_tokens)
        for document in documents:
            writer.add(document, digest=sum(document))
        writer.close()
        for shard in writer.shards:
            file = shard.prefix.relative_to(folder).as_posix()
            shards.append({"file": file, "source": source, "documents": shard.documents, "tokens": shard.tokens})
    sources = [{"name": name, "weight": 1.0} for name in documents_by_source]
    manifest = {"tokenizer_sha256": "x", "sources": sources, "splits": {"train": {"shards": shards}}}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    write_artifact(folder, "token_shards", recipe_sha256="x", parents={})
    return [document for documents in documents_by_source.values() for document in documents]


def random_documents(seed, count, top):
    random = np.random.default_rng(seed)
    return [random.integers(0, top, random.integers(1, 30)).tolist() for _ in range(count)]


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65_499, 2), (65_500, 4), (200_000, 4)])
def test_what_is_written_is_read(tmp_path, vocab_size, itemsize):
    sources = {"a.b": random_documents(0, 40, vocab_size), "none": [], "c": random_documents(1, 25, vocab_size)}
    sources["c"][3] = [vocab_size - 1] * 80  # longer than a shard
    documents = write(tmp_path, sources, vocab_size)
    shards = TokenShards.open(tmp_path, "train")
    assert len(shards) == len(documents) == 65
    assert [shards.read(index).tolist() for index in range(len(shards))] == documents
    assert shards.lengths_D.tolist() == [len(document) for document in documents] and shards.lengths_D.dtype == np.int64
    assert shards.source_D.tolist() == [0] * 40 + [2] * 25 and shards.source_D.dtype == np.uint16
    assert [source["name"] for source in shards.sources] == ["a.b", "none", "c"]
    assert shards.digests_D.tolist() == [sum(document) for document in documents]
    assert shards.digests_D.dtype == np.uint64 and shards.split == "train"
    bins = sorted((tmp_path / "train").glob("*.bin"))
    assert len(bins) > 10 and sum(path.stat().st_size for path in bins) == itemsize * sum(map(len, documents))
    assert sorted(path.stat().st_size // itemsize for path in bins)[-2:] != [80, 80]
    assert all(
        path.stat().st_size // itemsize in range(1, 51) or path.stat().st_size // itemsize == 80 for path in bins
    )


def test_parts_of_documents_are_slices(tmp_path):
    documents = write(tmp_path, {"a": random_documents(2, 30, 1000)})
    shards = TokenShards.open(tmp_path, "train")
    for index in (0, 7, 29):
        for start, stop in ((0, None), (1, 3), (2, 10_000), (-2, None), (0, -1), (5, 2), (10_000, None)):
            part = shards.read(index, start, stop)
            assert part.tolist() == documents[index][start:stop] and part.dtype == np.int64
    for index in (-1, 30):
        with pytest.raises(IndexError):
            shards.read(index)


def test_bytes_are_megatrons(tmp_path):
    writer = ShardWriter(tmp_path, "a", 1000, 100)
    writer.add([1, 2, 3], 2**64 - 1)
    writer.add([500], 7)
    writer.close()
    assert (tmp_path / "a-00000.bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 500)
    assert (tmp_path / "a-00000.idx").read_bytes() == (
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i2q3q", 3, 1, 0, 6, 0, 1, 2)
    )


@pytest.mark.parametrize("part", ["bin", "idx"])
@pytest.mark.parametrize("size", [0, 20, -2, 2])
def test_a_file_of_wrong_size_is_named(tmp_path, part, size):
    write(tmp_path, {"a": random_documents(3, 3, 1000)}, max_shard_tokens=1000)
    path = tmp_path / "train" / f"a-00000.{part}"
    content = path.read_bytes()
    path.write_bytes(content + bytes(2) if size == 2 else content[:size])
    with pytest.raises(UserError, match=re.escape(path.name)):
        TokenShards.open(tmp_path, "train")


@pytest.mark.parametrize(("offset", "value"), [(0, b"X"), (9, b"\x02"), (17, b"\x06"), (18, b"\x09"), (34, b"\x7f")])
def test_a_changed_index_is_named(tmp_path, offset, value):
    write(tmp_path, {"a": random_documents(4, 3, 1000)}, max_shard_tokens=1000)
    path = tmp_path / "train" / "a-00000.idx"
    content = bytearray(path.read_bytes())
    content[offset : offset + 1] = value
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(path.name)):
        open_shard(path.with_suffix(""))


def test_a_shard_of_another_run_is_noticed(tmp_path):
    write(tmp_path, {"a": random_documents(5, 3, 1000)}, max_shard_tokens=1000)
    writer = ShardWriter(tmp_path / "train", "a", 1000, 1000)
    writer.add([1, 2, 3], 0)
    writer.close()
    with pytest.raises(UserError, match="a-00000"):
        TokenShards.open(tmp_path, "train")


def test_digests_are_missed_and_their_damage_is_noticed(tmp_path):
    write(tmp_path, {"a": random_documents(7, 3, 1000)}, max_shard_tokens=1000)
    path = tmp_path / "train" / "a-00000.digests"
    assert path.read_bytes() == struct.pack("<3Q", *(sum(document) for document in random_documents(7, 3, 1000)))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="holds 2 digests for 3 documents"):
        _ = TokenShards.open(tmp_path, "train").digests_D
    path.unlink()
    with pytest.raises(UserError, match=re.escape("a-00000.digests is not there")):
        _ = TokenShards.open(tmp_path, "train").digests_D


def test_missing_files_splits_and_other_tokenizers_are_errors(tmp_path):
    with pytest.raises(UserError, match="not there or not finished"):
        TokenShards.open(tmp_path, "train")
    write(tmp_path, {"a": random_documents(6, 3, 1000)})
    with pytest.raises(UserError, match="no split 'test'"):
        TokenShards.open(tmp_path, "test")
    with pytest.raises(UserError, match="not the one"):
        TokenShards.open(tmp_path, "train").require_tokenizer(tmp_path)
    (tmp_path / "train" / "a-00000.bin").unlink()
    with pytest.raises(UserError, match=re.escape("a-00000.bin is not there")):
        TokenShards.open(tmp_path, "train")

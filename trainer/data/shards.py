"""Token shards: Megatron indexed datasets (.bin + .idx), written in parts of a bounded size and read memory-mapped.
Which documents come, in which order and with which weight is left to whoever writes and whoever samples.

Format, as read in megatron.core.datasets.indexed_dataset: the .bin holds the tokens of all sequences end to end; the
.idx holds magic, version, dtype code, numbers of sequences and of document indices, then lengths (int32), byte offsets
(int64) and document indices (int64, from 0 to the number of sequences). Here one document is one sequence.
Beside them lies our own .digests: a uint64 for each document, of its text alone."""

import bisect
import functools
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from trainer.artifact import content_hash, read_artifact
from trainer.errors import UserError

MANIFEST_FILE = "manifest.json"
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DIGEST = np.dtype("<u8")
_DTYPES = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
# Megatron's own limit for two bytes a token (DType.optimal_dtype); it leaves room below 2**16 for padding.
_UINT16_VOCAB = 65500


@dataclass(frozen=True)
class Shard:
    """What a writer finished: `<prefix>.bin`, `<prefix>.idx` and `<prefix>.digests`."""

    prefix: Path
    documents: int
    tokens: int


class ShardWriter:
    """Writes the documents of one source and split into `<folder>/<name>-00000.bin` and `.idx`, `-00001` and so on."""

    def __init__(self, folder: Path, name: str, vocab_size: int, max_shard_tokens: int) -> None:
        self.shards: list[Shard] = []
        """Finished ones; the next is numbered after them."""
        self._folder, self._name, self._max_tokens = folder, name, max_shard_tokens
        self._code = 8 if vocab_size < _UINT16_VOCAB else 4
        self._lengths_D: list[int] = []
        self._digests_D: list[int] = []
        self._tokens = 0
        self._bin: BinaryIO | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, tokens_L: Sequence[int], digest: int) -> Shard | None:
        """Append one document, `digest` being 64 bits of its text's; a shard ends before it would exceed its size, and
        a longer document has its own. Returns the shard that ended before the document, if one did."""
        full = self._lengths_D and self._tokens + len(tokens_L) > self._max_tokens
        finished = self.close() if full else None
        if self._bin is None:
            self._bin = _suffixed(self._prefix, ".bin").open("wb")
        self._bin.write(np.asarray(tokens_L, dtype=_DTYPES[self._code]).tobytes())
        self._lengths_D.append(len(tokens_L))
        self._digests_D.append(digest)
        self._tokens += len(tokens_L)
        return finished

    def close(self) -> Shard | None:
        """Finish and return the open shard, if there is one."""
        if self._bin is None:
            return None
        self._bin.close()
        write_index(_suffixed(self._prefix, ".idx"), self._lengths_D, self._code)
        _suffixed(self._prefix, ".digests").write_bytes(np.asarray(self._digests_D, dtype=_DIGEST).tobytes())
        self.shards.append(Shard(self._prefix, len(self._lengths_D), self._tokens))
        self._lengths_D, self._digests_D, self._tokens, self._bin = [], [], 0, None
        return self.shards[-1]

    @property
    def _prefix(self) -> Path:
        return self._folder / f"{self._name}-{len(self.shards):05d}"


def write_index(path: Path, lengths_D: Sequence[int], dtype_code: int) -> None:
    """Write the .idx for documents of these lengths in tokens."""
    lengths = np.asarray(lengths_D, dtype=np.int64)
    offsets = (np.cumsum(lengths) - lengths) * _DTYPES[dtype_code].itemsize
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, dtype_code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write(offsets.astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def open_shard(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """Lengths (int64) of the documents of one shard, and its tokens end to end, memory-mapped.

    Raises UserError that names the file which is missing, of another format, cut short or damaged.
    """
    index, data = _suffixed(prefix, ".idx"), _suffixed(prefix, ".bin")
    for path in (index, data):
        if not path.is_file():
            raise UserError(f"{path} is not there", "every shard that the manifest names", "run prepare again")
    content = index.read_bytes()
    if len(content) < _HEADER.size:
        raise _damaged(index, f"has {len(content)} bytes, less than a header")
    magic, version, code, sequences, indices = _HEADER.unpack_from(content)
    if (magic, version) != (_MAGIC, 1) or code not in _DTYPES:
        raise _damaged(index, f"starts with {magic!r}, version {version}, type {code}")
    expected_bytes = _HEADER.size + 12 * sequences + 8 * indices
    if len(content) != expected_bytes:
        raise _damaged(index, f"has {len(content)} bytes, where its header promises {expected_bytes}")
    lengths_D = np.frombuffer(content, "<i4", sequences, _HEADER.size).astype(np.int64)
    offsets_D = np.frombuffer(content, "<i8", sequences, _HEADER.size + 4 * sequences)
    itemsize = _DTYPES[code].itemsize
    if (lengths_D < 0).any() or (offsets_D != (np.cumsum(lengths_D) - lengths_D) * itemsize).any():
        raise _damaged(index, "holds offsets that do not follow from its lengths")
    expected_bytes = int(lengths_D.sum()) * itemsize
    if data.stat().st_size != expected_bytes:
        raise _damaged(data, f"has {data.stat().st_size} bytes, where its index promises {expected_bytes}")
    empty = np.zeros(0, _DTYPES[code])
    return lengths_D, np.memmap(data, _DTYPES[code], mode="r") if expected_bytes else empty


class TokenShards:
    """All documents of one split, in the order of the manifest's shards, as one sequence of token arrays."""

    def __init__(
        self,
        manifest: dict[str, Any],
        split: str,
        shards: list[tuple[np.ndarray, np.ndarray]],
        digest_files: Sequence[Path] = (),
    ) -> None:
        self.manifest = manifest
        self.split = split
        self._digest_files = digest_files
        self.sources: list[dict[str, Any]] = manifest["sources"]
        entries = manifest["splits"][split]["shards"]
        position = {source["name"]: index for index, source in enumerate(self.sources)}
        index_S = np.asarray([position[entry["source"]] for entry in entries], dtype=np.uint16)
        counts_S = np.asarray([len(lengths_D) for lengths_D, _ in shards], dtype=np.int64)
        self.lengths_D = np.concatenate([lengths_D for lengths_D, _ in shards])
        """int64: tokens of each document, with the end-of-document token where the manifest names one."""
        self.source_D = np.repeat(index_S, counts_S)
        """uint16: index of each document's source in `sources`."""
        self._tokens_S = [np.asarray(tokens) for _, tokens in shards]  # a slice of a memmap costs much more
        first_S = np.cumsum(counts_S) - counts_S
        self._first_S: list[int] = first_S.tolist()  # first document of each shard
        tokens_before_D = np.cumsum(self.lengths_D) - self.lengths_D
        self._offset_D = tokens_before_D - np.repeat(tokens_before_D[first_S], counts_S)  # within its shard

    @classmethod
    def open(cls, folder: Path, split: str) -> Self:
        """Open the shards of `train` or `validation` in a folder that prepare wrote.

        Raises UserError for a folder that is not finished and for any file that is not as the manifest says.
        """
        read_artifact(folder, "token_shards")
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if split not in manifest["splits"]:
            raise UserError(f"{folder} has no split {split!r}", f"one of {', '.join(manifest['splits'])}")
        shards, digest_files = [], []
        for entry in manifest["splits"][split]["shards"]:
            digest_files.append(_suffixed(folder / entry["file"], ".digests"))
            lengths_D, tokens = open_shard(folder / entry["file"])
            if (len(lengths_D), len(tokens)) != (entry["documents"], entry["tokens"]):
                raise _damaged(
                    folder / f"{entry['file']}.idx",
                    f"holds {len(lengths_D)} documents and {len(tokens)} tokens, where {MANIFEST_FILE} says "
                    f"{entry['documents']} and {entry['tokens']}",
                )
            shards.append((lengths_D, tokens))
        return cls(manifest, split, shards, digest_files)

    @functools.cached_property
    def digests_D(self) -> np.ndarray:
        """uint64: half of the digest of each document's text, not the half that chose its split.

        Raises UserError for shards that an earlier version wrote without them, and for a damaged file.
        """
        for file in self._digest_files:
            if not file.is_file():
                raise UserError(f"{file} is not there", "digests, which weights that are no whole number need",
                                "run prepare again")  # fmt: skip
        digests_D = np.concatenate([np.fromfile(file, _DIGEST) for file in self._digest_files])
        if len(digests_D) != len(self):
            raise _damaged(self._digest_files[0].parent, f"holds {len(digests_D)} digests for {len(self)} documents")
        return digests_D

    def __len__(self) -> int:
        return len(self.lengths_D)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Token ids (int64) of a document, or of its part from `start` to before `stop`, as a slice counts them."""
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        start, stop, _ = slice(start, stop).indices(int(self.lengths_D[document]))
        shard = bisect.bisect_right(self._first_S, document) - 1
        offset = int(self._offset_D[document])
        return self._tokens_S[shard][offset + start : offset + stop].astype(np.int64)

    def require_tokenizer(self, folder: Path) -> None:
        """UserError unless the shards were written with the tokenizer in `folder`."""
        if content_hash(folder) != self.manifest["tokenizer_sha256"]:
            raise UserError(
                f"the tokenizer in {folder} is not the one that the token shards were written with",
                "shards and tokenizer of one run of prepare",
                "run prepare again",
            )


def _suffixed(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)  # with_suffix would cut a dot in the source's name


def _damaged(path: Path, found: str) -> UserError:
    return UserError(f"{path} {found}", "a Megatron indexed dataset as prepare wrote it", "run prepare again")

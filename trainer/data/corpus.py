"""From sources to the kept documents of each split: short ones and repetitions dropped and counted, the rest held
on disk, so that no corpus has to fit into memory. Files that an interrupted run had read are not read again.
Tokens are the business of `tokenizer` and `shards`."""

import hashlib
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from trainer.config import Prepare, Source
from trainer.data.files import find_files, source_names, stamp
from trainer.data.journal import Journal
from trainer.data.sources import BadDocument, Document, read_file
from trainer.errors import UserError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
_DIGEST_BYTES = 16
_LENGTH_BYTES = 8


@dataclass
class SourceCounts:
    """What became of one source's documents."""

    name: str
    source: Source
    files: int
    documents_read: int = 0
    documents_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    content: "dict[Split, hashlib._Hash]" = field(default_factory=lambda: {split: hashlib.sha256() for split in SPLITS})
    """Over the digests of the kept documents, in order: two equal ones had the same text to work with."""

    def state(self) -> dict[str, Any]:
        """What `restore` takes, and the hashes to hold it against."""
        counts = {"read": self.documents_read, "kept": self.documents_kept, "dropped": dict(self.dropped)}
        return counts | {"content": {split: digest.hexdigest() for split, digest in self.content.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """The counts of `state`; the content's hashes come from the documents themselves."""
        self.documents_read, self.documents_kept = state["read"], state["kept"]
        self.dropped = Counter(state["dropped"])


class Corpus:
    """Kept documents on disk, in the order of the recipe's sources and their sorted files."""

    def __init__(self, folder: Path, sources: list[SourceCounts], deduplicate: bool) -> None:
        self.folder = folder
        self.sources = sources
        self.seen: set[bytes] | None = set() if deduplicate else None
        """Digests of all documents that are kept, where no other may be equal."""
        self._rank_D = array("Q")  # training documents: what decides the order below
        self._bytes_D = array("Q")

    def texts(self, split: Split, source: int, skip: int = 0) -> Iterator[str]:
        """All documents that one source gave to a split, but for the first `skip`."""
        for utf8 in self._records(split, source, skip):
            yield utf8.decode("utf-8")

    def training_texts(self, max_bytes: int) -> Iterator[str]:
        """Training documents up to `max_bytes` of UTF-8 together, chosen in the order of their hashes.

        The document that crosses the limit is cut, so that one huge document is not left out altogether.
        """
        allowed_D = _allowances(np.asarray(self._rank_D), np.asarray(self._bytes_D), max_bytes)
        records = (utf8 for source in range(len(self.sources)) for utf8 in self._records("train", source))
        for utf8, allowed in zip(records, allowed_D, strict=True):
            if allowed:
                yield utf8[:allowed].decode("utf-8", errors="ignore")

    def path(self, split: Split, source: int) -> Path:
        """The file with the documents that one source gave to a split: length, UTF-8, length, UTF-8 ..."""
        return self.folder / f"{split}-{source}"

    def remember(self, source: int, split: Split, digest: bytes, size_bytes: int) -> None:
        """Note a kept document: that it was seen, what it adds to the content, its place in hash order and its size."""
        if self.seen is not None:
            self.seen.add(digest)
        self.sources[source].content[split].update(digest)
        if split == "train":
            self._rank_D.append(rank_of(digest))
            self._bytes_D.append(size_bytes)

    def restore(self, source: int, state: dict[str, Any]) -> bool:
        """Take over what an earlier run kept of a source; False if its documents are not as that run noted them."""
        count = self.sources[source]
        count.restore(state)
        for split in SPLITS:
            path, size = self.path(split, source), state["bytes"][split]
            if not path.is_file() or path.stat().st_size < size:
                return False
            os.truncate(path, size)  # what follows is of a file that was not read to its end
            for utf8 in self._records(split, source):
                self.remember(source, split, document_digest(utf8), len(utf8))
        return count.state()["content"] == state["content"]

    def _records(self, split: Split, source: int, skip: int = 0) -> Iterator[bytes]:
        with self.path(split, source).open("rb") as file:
            while length := file.read(_LENGTH_BYTES):
                size = int.from_bytes(length, "little")
                if skip:
                    skip -= 1
                    file.seek(size, os.SEEK_CUR)
                else:
                    yield file.read(size)


def collect(
    prepare: Prepare, folder: Path, journal: Journal, after_file: Callable[[int, int], None] = lambda done, total: None
) -> Corpus:
    """Read all sources once and keep their documents below `folder`, each file a step of the journal.

    `after_file` hears how many files are done, of how many. Raises UserError for a bad document where the source says
    so, for sources without files, and when a split stays empty.
    """
    names = source_names(prepare.sources)
    files = [(index, path) for index, source in enumerate(prepare.sources) for path in find_files(source)]
    number = Counter(index for index, _ in files)

    def empty() -> Corpus:
        counts = [SourceCounts(name, prepare.sources[index], number[index]) for index, name in enumerate(names)]
        return Corpus(folder, counts, prepare.deduplicate)

    corpus, done = _taken_over(journal, files, empty)
    for index, path in files[done:]:
        seen = stamp(path)  # before it is read: a file that changes meanwhile is not taken over
        size = _read(prepare, corpus, index, path)
        journal.note("file", [index, *seen], corpus.sources[index].state() | {"bytes": size})
        done += 1
        after_file(done, len(files))
    require_both_splits({split: sum(_sizes(corpus, split)) for split in SPLITS}, corpus.sources)
    return corpus


def split_texts(prepare: Prepare, split: Split, per_source: int) -> Iterator[str]:
    """Up to `per_source` documents of a split from each source, read anew from its files.

    The documents that `collect` keeps, but for repetitions; bad ones are passed over. UserError where files are gone.
    """
    for source in prepare.sources:
        left = per_source if source.split in ("hash", split) else 0
        documents = (document for path in find_files(source) for document in read_file(source, path))
        while left and (document := next(documents, None)) is not None:
            if isinstance(document, BadDocument) or document.characters < prepare.min_document_characters:
                continue
            if _split(source, document_digest(document.utf8), prepare) == split:
                left -= 1
                yield document.utf8.decode("utf-8")


def document_digest(utf8: bytes) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(utf8, digest_size=_DIGEST_BYTES).digest()


def rank_of(digest: bytes) -> int:
    """The half of a digest that does not choose the split, for whatever else is drawn by a document's text."""
    return int.from_bytes(digest[8:], "big")


def split_of(digest: bytes, validation_fraction: float) -> Split:
    """The split of a document: a function of its text alone, so that more data never moves it across."""
    return "validation" if int.from_bytes(digest[:8], "big") < validation_fraction * 2**64 else "train"


def require_both_splits(amounts: dict[Split, int], counts: list[SourceCounts]) -> None:
    """UserError when nothing is left for training or for validation, with what was dropped and why."""
    empty = [split for split in SPLITS if not amounts[split]]
    if not empty:
        return
    dropped = sum((count.dropped for count in counts), Counter())
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items())) or "none"
    read = sum(count.documents_read for count in counts)
    raise UserError(
        f"no {' and no '.join(empty)} documents are left of {read} read (dropped: {reasons})",
        "at least one document in each of train and validation",
        "add data, use smaller documents (document: line or block), raise validation_fraction, or set a source's split",
    )


def _taken_over(journal: Journal, files: Sequence[tuple[int, Path]], empty: Callable[[], Corpus]) -> tuple[Corpus, int]:
    """What an earlier run kept of the first files, and how many these are; where nothing holds, an empty corpus."""
    done, last = 0, {}
    for index, path in files:
        state = journal.recall("file", [index, *stamp(path)])
        if state is None:
            break
        done, last[index] = done + 1, state
    corpus = empty()
    if last and all(corpus.restore(index, state) for index, state in last.items()):
        for index in set(range(len(corpus.sources))) - set(last):  # begun, and no file read to its end
            for split in SPLITS:
                corpus.path(split, index).unlink(missing_ok=True)
        return corpus, done
    journal.forget(done)
    shutil.rmtree(corpus.folder, ignore_errors=True)
    corpus.folder.mkdir(parents=True)
    return empty(), 0


def _read(prepare: Prepare, corpus: Corpus, index: int, path: Path) -> dict[Split, int]:
    """Keep the documents of a file; returns how many bytes its source now has in each split."""
    with corpus.path("train", index).open("ab") as train, corpus.path("validation", index).open("ab") as validation:
        files: dict[Split, BinaryIO] = {"train": train, "validation": validation}
        for document in read_file(prepare.sources[index], path):
            _take(document, index, prepare, files, corpus)
        return {split: file.tell() for split, file in files.items()}


def _take(
    document: Document | BadDocument, index: int, prepare: Prepare, files: dict[Split, BinaryIO], corpus: Corpus
) -> None:
    count = corpus.sources[index]
    count.documents_read += 1
    if isinstance(document, BadDocument):
        _refuse_or_count(document, count)
        return
    if document.characters < prepare.min_document_characters:
        count.dropped["too_short"] += 1
        return
    digest = document_digest(document.utf8)
    if corpus.seen is not None and digest in corpus.seen:
        count.dropped["duplicate"] += 1
        return
    split = _split(count.source, digest, prepare)
    count.documents_kept += 1
    files[split].write(len(document.utf8).to_bytes(_LENGTH_BYTES, "little"))
    files[split].write(document.utf8)
    corpus.remember(index, split, digest, len(document.utf8))


def _split(source: Source, digest: bytes, prepare: Prepare) -> Split:
    return split_of(digest, prepare.validation_fraction) if source.split == "hash" else source.split


def _refuse_or_count(bad: BadDocument, count: SourceCounts) -> None:
    # Python's own tests hold files that are wrong on purpose, and nobody can mend them: always counted, never an error.
    if count.source.on_bad_document == "error" and count.source.type != "stdlib":
        raise UserError(
            f"source {count.name}: {bad.where}: {bad.message}",
            "documents that can be read",
            "mend it, or set on_bad_document: skip for this source, which counts and reports such documents",
        )
    count.dropped[bad.reason] += 1


def _sizes(corpus: Corpus, split: Split) -> list[int]:
    return [corpus.path(split, source).stat().st_size for source in range(len(corpus.sources))]


def _allowances(rank_D: np.ndarray, bytes_D: np.ndarray, max_bytes: int) -> list[int]:
    """How many bytes of each document go into the tokenizer's training text."""
    order_D = np.argsort(rank_D, kind="stable")
    before_D = np.cumsum(bytes_D[order_D]) - bytes_D[order_D]
    allowed_D = np.zeros(len(rank_D), dtype=np.int64)
    allowed_D[order_D] = np.clip(max_bytes - before_D.astype(np.int64), 0, bytes_D[order_D].astype(np.int64))
    return allowed_D.tolist()

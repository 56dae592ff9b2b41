"""Encodes a corpus into token shards and counts everything on the way; the counts are the manifest.
The shards' format is in `shards`, the tokenizer's making in `tokenizer`."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from trainer.artifact import hash_file
from trainer.config import Prepare
from trainer.data.corpus import (
    SPLITS,
    Corpus,
    SourceCounts,
    Split,
    document_digest,
    rank_of,
    require_both_splits,
)
from trainer.data.journal import Journal
from trainer.data.shards import Shard, ShardWriter
from trainer.data.tokenizer import TokenizerQuality, encode, encoding_backend
from trainer.errors import UserError

_PARTS = ("bin", "idx", "digests")


@dataclass
class SplitCounts:
    """What a split holds; tokens include one end of document for each, where the tokenizer has one."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0

    def add(self, text: str, size_bytes: int, tokens: int) -> None:
        """Count one document."""
        self.documents += 1
        self.characters += len(text)
        self.bytes += size_bytes
        self.tokens += tokens


def write_shards(
    prepare: Prepare,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    journal: Journal,
    after_document: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write `<folder>/<split>/<source>-00000.bin/.idx` and return the manifest, without format and tokenizer hash.

    A document that the tokenizer turns into nothing is dropped and counted. Each shard is a step of the journal.
    `after_document` hears how many documents are done, of how many. The tokenizer is measured on the validation split,
    which it was not trained on. UserError when a split has no tokens.
    """
    encoder = _Encoder(prepare, tokenizer, folder, journal)
    total, done = sum(source.documents_kept for source in corpus.sources), 0
    for split in SPLITS:
        for index in range(len(corpus.sources)):
            for number in encoder.encode(corpus, split, index):
                done += number
                after_document(done, total)
    for source in corpus.sources:
        if lost := encoder.no_tokens[source.name]:
            source.documents_kept -= lost
            source.dropped["no_tokens"] = lost
    amounts: dict[Split, int] = {split: counts.documents for split, counts in encoder.splits.items()}
    require_both_splits(amounts, corpus.sources)
    encoder.remove_strays()
    return {
        "vocab_size": len(tokenizer),
        "end_of_document": tokenizer.eos_token_id,
        "splits": {split: vars(counts) | {"shards": encoder.shards[split]} for split, counts in encoder.splits.items()},
        "sources": [_source_entry(source) for source in corpus.sources],
        "tokenizer": encoder.quality.metrics(),
    }


class _Encoder:
    """Encodes sources one after the other, and what it counted on the way."""

    def __init__(self, prepare: Prepare, tokenizer: PreTrainedTokenizerFast, folder: Path, journal: Journal) -> None:
        self.splits: dict[Split, SplitCounts] = {split: SplitCounts() for split in SPLITS}
        self.shards: dict[Split, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self.quality = TokenizerQuality(_single(tokenizer.unk_token_id))
        self.no_tokens: Counter[str] = Counter()
        self._max_shard_tokens, self._folder, self._journal = prepare.max_shard_tokens, folder, journal
        self._backend, self._vocab_size = encoding_backend(tokenizer), len(tokenizer)
        end_id = _single(tokenizer.eos_token_id)
        self._end = [] if end_id is None else [end_id]

    def encode(self, corpus: Corpus, split: Split, index: int) -> Iterator[int]:
        """Write what a source gave to a split; gives out how many more of its documents are done."""
        name = corpus.sources[index].name
        writer = ShardWriter(self._folder / split, name, self._vocab_size, self._max_shard_tokens)
        done = taken_over = self._take_over(writer, split, name)
        yield done
        content = hashlib.sha256()
        for text, ids in encode(self._backend, corpus.texts(split, index, skip=done)):
            utf8 = text.encode("utf-8")
            digest = document_digest(utf8)
            content.update(digest)
            if ids:
                finished = writer.add(ids + self._end, rank_of(digest))
                self._note(finished, split, name, done)
                self.splits[split].add(text, len(utf8), len(ids) + len(self._end))
                if split == "validation":
                    self.quality.add(text, ids)
            else:
                self.no_tokens[name] += 1
            done += 1
            yield 1
        if not taken_over and content.digest() != corpus.sources[index].content[split].digest():
            raise UserError(
                f"{corpus.path(split, index)} is not what was written there",
                "one prepare at work in a run folder",
                "see that no other one runs, and run this one again",
            )
        self._note(writer.close(), split, name, done)

    def remove_strays(self) -> None:
        """Remove shards that an interrupted run wrote beyond the last one of now, as its files held more."""
        ours = {f"{shard['file']}.{part}" for shards in self.shards.values() for shard in shards for part in _PARTS}
        for path in self._folder.rglob("*.*"):
            if path.relative_to(self._folder).as_posix() not in ours:
                path.unlink()

    def _take_over(self, writer: ShardWriter, split: Split, name: str) -> int:
        """Take over the shards of an interrupted run; returns how many documents of the source are in them."""
        done = 0
        while (state := self._journal.recall("shard", [split, name, len(writer.shards)])) is not None:
            shard = Shard(self._folder / state["shard"]["file"], state["shard"]["documents"], state["shard"]["tokens"])
            if _hashes(shard) != state["shard"]["sha256"]:
                self._journal.forget(1)
                break
            done = state["documents_done"]
            writer.shards.append(shard)
            self.shards[split].append(state["shard"])
            self.splits = {each: SplitCounts(**state["splits"][each]) for each in SPLITS}
            self.quality, self.no_tokens = TokenizerQuality(**state["quality"]), Counter(state["no_tokens"])
        return done

    def _note(self, finished: Shard | None, split: Split, name: str, documents_done: int) -> None:
        """Write down a finished shard, and the counts up to it."""
        if finished is None:
            return
        entry = _shard_entry(finished, self._folder, name)
        number = sum(shard["source"] == name for shard in self.shards[split])
        self.shards[split].append(entry)
        counts = {each: vars(counted) for each, counted in self.splits.items()}
        state = {"shard": entry, "documents_done": documents_done, "splits": counts, "no_tokens": self.no_tokens}
        self._journal.note("shard", [split, name, number], state | {"quality": vars(self.quality)})


def _single(token_id: Any) -> int | None:
    # transformers types it as anything; only several extra special tokens would be a list.
    assert token_id is None or isinstance(token_id, int)
    return token_id


def _shard_entry(shard: Shard, folder: Path, source: str) -> dict[str, Any]:
    file = shard.prefix.relative_to(folder).as_posix()
    counts = {"documents": shard.documents, "tokens": shard.tokens}
    return {"file": file, "source": source, **counts, "sha256": _hashes(shard)}


def _hashes(shard: Shard) -> dict[str, str]:
    """Hash of each of a shard's files that is there."""
    paths = {part: shard.prefix.with_name(f"{shard.prefix.name}.{part}") for part in _PARTS}
    return {part: hash_file(path) for part, path in paths.items() if path.is_file()}


def _source_entry(counts: SourceCounts) -> dict[str, Any]:
    return {
        "name": counts.name,
        "type": counts.source.type,
        "weight": counts.source.weight,
        "split": counts.source.split,
        "files": counts.files,
        "documents_read": counts.documents_read,
        "documents_kept": counts.documents_kept,
        "dropped": dict(sorted(counts.dropped.items())),
        "content_sha256": {split: digest.hexdigest() for split, digest in counts.content.items()},
    }

"""Encodes a corpus into token shards and counts everything on the way; the counts are the manifest.
The shards' format is in `shards`, the tokenizer's making in `tokenizer`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
from trainer.data.shards import Shard, ShardWriter
from trainer.data.tokenizer import TokenizerQuality, encode, encoding_backend

_PARTS = ("bin", "idx", "digests")


@dataclass
class SplitCounts:
    """What a split holds; tokens include one end of document for each, where the tokenizer has one."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)


def write_shards(
    prepare: Prepare,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    after_document: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write `<folder>/<split>/<source>-00000.bin/.idx` and return the manifest, without format and tokenizer hash.

    A document that the tokenizer turns into nothing is dropped and counted. `after_document` hears how many are done,
    of how many. The tokenizer is measured on the validation split, which it was not trained on. UserError when a split
    has no tokens.
    """
    splits: dict[Split, SplitCounts] = {split: SplitCounts() for split in SPLITS}
    quality = TokenizerQuality(_single(tokenizer.unk_token_id))
    total = sum(source.documents_kept for source in corpus.sources)
    documents = _encoded(corpus, tokenizer, prepare.max_shard_tokens, folder, splits)
    for done, (split, index, text, ids) in enumerate(documents, start=1):
        after_document(done, total)
        if not ids:
            corpus.sources[index].documents_kept -= 1
            corpus.sources[index].dropped["no_tokens"] += 1
        elif split == "validation":
            quality.add(text, ids)
    amounts: dict[Split, int] = {split: counts.documents for split, counts in splits.items()}
    require_both_splits(amounts, corpus.sources)
    return {
        "vocab_size": len(tokenizer),
        "end_of_document": tokenizer.eos_token_id,
        "splits": {split: vars(counts) for split, counts in splits.items()},
        "sources": [_source_entry(source) for source in corpus.sources],
        "tokenizer": quality.metrics(),
    }


def _encoded(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    max_shard_tokens: int,
    folder: Path,
    splits: dict[Split, SplitCounts],
) -> Iterator[tuple[Split, int, str, list[int]]]:
    """Write every document; give out its split, source, text and ids (without the end of document)."""
    backend = encoding_backend(tokenizer)
    end_id = _single(tokenizer.eos_token_id)
    end = [] if end_id is None else [end_id]
    for split, counts in splits.items():
        for index, source in enumerate(corpus.sources):
            writer = ShardWriter(folder / split, source.name, len(tokenizer), max_shard_tokens)
            for text, ids in encode(backend, corpus.texts(split, index)):
                if ids:
                    utf8 = text.encode("utf-8")
                    writer.add(ids + end, rank_of(document_digest(utf8)))
                    counts.documents += 1
                    counts.characters += len(text)
                    counts.bytes += len(utf8)
                    counts.tokens += len(ids) + len(end)
                yield split, index, text, ids
            writer.close()
            counts.shards += [_shard_entry(shard, folder, source.name) for shard in writer.shards]


def _single(token_id: Any) -> int | None:
    # transformers types it as anything; only several extra special tokens would be a list.
    assert token_id is None or isinstance(token_id, int)
    return token_id


def _shard_entry(shard: Shard, folder: Path, source: str) -> dict[str, Any]:
    hashes = {part: hash_file(shard.prefix.with_name(f"{shard.prefix.name}.{part}")) for part in _PARTS}
    file = shard.prefix.relative_to(folder).as_posix()
    return {"file": file, "source": source, "documents": shard.documents, "tokens": shard.tokens, "sha256": hashes}


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
        "content_sha256": counts.content.hexdigest(),
    }

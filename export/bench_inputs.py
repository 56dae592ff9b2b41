"""What the benchmark feeds: one batch of real text for each cell of the grid, and those on which quality is measured.
They are made once from the recipe's seed, so that every backend gets the same.

Shape letters: B batch, T sequence length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.cases import Documents, full_rows
from export.io_spec import IoSpec
from export.scores import NOT_A_TARGET
from trainer.errors import UserError
from trainer.export_config import Bench, Lengths

METRICS = {"masked_lm": "masked_accuracy", "causal_lm": "perplexity", "seq2seq_lm": "perplexity"}
_QUALITY_BATCH = 8
_MASKED_SHARE = 0.15  # BERT's (Devlin et al. 2019); all targets become [MASK], which leaves nothing else to chance
_MIN_ROW_TOKENS = 8  # shorter pieces of text give hardly any context to predict from


@dataclass(frozen=True)
class Cell:
    """One batch of the grid: its size, its longest row, and whether rows are full or as long as documents are."""

    batch_size: int
    sequence_length: int
    lengths: Lengths = "full"


def grid(settings: Bench) -> list[Cell]:
    """The cells to measure, small shapes first: memory that a large one took is not given back.

    A batch of one is never padded, so that it has no cell of real lengths.
    """
    cells = {
        Cell(batch, length, lengths)
        for batch in settings.batch_sizes
        for length in settings.sequence_lengths
        for lengths in settings.lengths
        if lengths == "full" or batch > 1
    }
    return sorted(cells, key=lambda cell: (cell.batch_size * cell.sequence_length, cell.batch_size, cell.lengths))


def speed_arrays(documents: Documents, spec: IoSpec, cells: Sequence[Cell], seed: int) -> dict[str, np.ndarray]:
    """`cell<i>|<input>` for each cell, of real tokens."""
    arrays = {}
    for index, cell in enumerate(cells):
        if cell.lengths == "full":
            inputs = full_rows(documents, spec.reader, cell.batch_size, cell.sequence_length).inputs
        else:
            inputs = pad_to_longest(spec.reader, draw_documents(documents, cell.batch_size, cell.sequence_length, seed))
        arrays |= {f"cell{index}|{name}": value for name, value in inputs.items()}
    return arrays


def prompts_of(settings: Bench, spec: IoSpec) -> list[tuple[int, int]]:
    """The (batch, prompt) pairs on which generating is measured: none for a model that does not generate."""
    decode = settings.decode
    if decode is None or spec.cache is None:
        return []
    new = 0 if spec.encoder else decode.new_tokens  # an encoder-decoder's text and its answer have room of their own
    fitting = [length for length in settings.sequence_lengths if length + new <= spec.max_length]
    return [(batch, length) for length in decode.prompt_lengths or fitting for batch in settings.batch_sizes]


def prompt_arrays(documents: Documents, spec: IoSpec, pairs: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """`prompts<i>` for each pair: token ids [B, P] of real text."""
    return {
        f"prompts{index}": full_rows(documents, spec.reader, batch, length).inputs["input_ids"]
        for index, (batch, length) in enumerate(pairs)
    }


def draw_documents(documents: Documents, count: int, longest: int, seed: int) -> list[np.ndarray]:
    """`count` documents drawn at random, one and the same only where there are too few, cut to `longest` tokens."""
    random = np.random.default_rng(seed)
    chosen = random.choice(len(documents), size=count, replace=count > len(documents))
    return [documents[index][:longest] for index in chosen]


def pad_to_longest(spec: IoSpec, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """One batch as a server makes it: padded to the longest of its rows."""
    return spec.pad(rows, max(map(len, rows)))


def quality_batches(
    documents: Documents, spec: IoSpec, folder: Path, length: int, sequences: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """Padded batches of up to `sequences` rows, each a piece of one document of at most `length` tokens.

    Masked LMs: 15 % of a row's tokens, at least one and none of them special, are masked; `labels` holds them.
    Encoder-decoders: prefix language modelling (Raffel et al. 2020, section 3.2.1), split in the middle: the encoder
    reads a row's first half, `labels` are the second, and the decoder reads these one place later (teacher forcing).
    """
    pieces = (piece for piece in _pieces(documents, length) if len(piece) > 1 or spec.encoder is None)
    rows = [row for _, row in zip(range(sequences), pieces, strict=False)]
    if not rows:
        raise UserError(
            "no document is long enough to measure quality on", f"{_MIN_ROW_TOKENS} tokens", "use more text"
        )
    random = np.random.default_rng(seed)
    masks = _special_tokens(folder) if spec.task == "masked_lm" else None
    batches = []
    for first in range(0, len(rows), _QUALITY_BATCH):
        chunk = rows[first : first + _QUALITY_BATCH]
        inputs = _halved(spec, chunk, length) if spec.encoder else spec.pad(chunk, length)
        if masks is not None:
            inputs["labels"] = _mask(inputs["input_ids"], chunk, *masks, random)
        batches.append(inputs)
    return batches


def _halved(spec: IoSpec, rows: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """An encoder-decoder's batch: of each row the first half to encode and, as labels, the rest, padded on the right.

    No special token is added: the text is cut from the middle of a document. The longer half is the second.
    """
    inputs = spec.reader.pad([row[: len(row) // 2] for row in rows], max(1, length // 2))
    labels_BT = np.full((len(rows), length - length // 2), NOT_A_TARGET, dtype=np.int64)
    for index, row in enumerate(rows):
        labels_BT[index, : len(row) - len(row) // 2] = row[len(row) // 2 :]
    read_BT = np.where(labels_BT == NOT_A_TARGET, spec.pad_id, labels_BT)
    start_B1 = np.full((len(rows), 1), spec.start_id, dtype=np.int64)
    shifted_BT = np.concatenate([start_B1, read_BT[:, :-1]], axis=1)
    return inputs | {"decoder_input_ids": shifted_BT, "labels": labels_BT}


def _pieces(documents: Documents, length: int) -> Iterator[np.ndarray]:
    """The first piece of each document, then the second of each that has one: few rows are of many documents."""
    for start in range(0, max(map(len, documents), default=0), length):
        for document in documents:
            if len(document) - start >= min(_MIN_ROW_TOKENS, length):
                yield document[start : start + length]


def _mask(
    ids_BT: np.ndarray, rows: Sequence[np.ndarray], mask_id: int, special: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Mask tokens of `ids_BT` in place; returns the labels, with -100 where a token is no target."""
    labels_BT = np.full_like(ids_BT, NOT_A_TARGET)
    for index, row in enumerate(rows):
        allowed = np.flatnonzero(~np.isin(row, special))
        count = min(len(allowed), max(1, round(_MASKED_SHARE * len(row))))
        chosen = random.choice(allowed, size=count, replace=False)
        labels_BT[index, chosen] = ids_BT[index, chosen]
        ids_BT[index, chosen] = mask_id
    return labels_BT


def _special_tokens(folder: Path) -> tuple[int, np.ndarray]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.mask_token_id is None:
        raise UserError(
            f"the tokenizer in {folder} has no mask token", "one, as every masked LM's", "mend the tokenizer"
        )
    return tokenizer.mask_token_id, np.asarray(tokenizer.all_special_ids)

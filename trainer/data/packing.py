"""Puts documents into rows of fixed length, without padding to speak of and without a word of text lost.
Which row comes when is `stream`'s business, which tokens become targets of a masked LM is `masking`'s.

Shapes: D documents, P pieces of documents, R rows, T tokens in a row.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.shards import TokenShards

NO_TARGET = -100  # the label that torch's cross entropy ignores, and transformers with it

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Framing:
    """What stands around the text of a piece, and how many input tokens of a row a piece may fill."""

    row_length: int
    causal: bool
    begin: int | None  # masked LM: [CLS]; causal: begin-of-sequence, before the first token of a document
    end: int | None  # masked LM: [SEP] after each piece; causal: none, the end-of-document token is in the shards
    pad: int

    @property
    def overhead(self) -> int:
        """Tokens of a piece that are not text."""
        return 0 if self.causal else (self.begin is not None) + (self.end is not None)


@dataclass(frozen=True)
class Row:
    """One packed row, all arrays [T], or several, [B, T]. `segments` numbers the pieces from 1, padding is 0."""

    input_ids: Ints
    segments: Ints
    positions: Ints
    targets: Ints  # causal: the next token of the piece; NO_TARGET elsewhere, and everywhere for a masked LM

    def part(self, rows: slice) -> "Row":
        """Some of several rows."""
        return Row(self.input_ids[rows], self.segments[rows], self.positions[rows], self.targets[rows])

    @staticmethod
    def stack(rows: "Sequence[Row]") -> "Row":
        """Rows of one length as one, arrays [B, T]."""
        return Row(
            np.stack([row.input_ids for row in rows]),
            np.stack([row.segments for row in rows]),
            np.stack([row.positions for row in rows]),
            np.stack([row.targets for row in rows]),
        )


class PackedRows:
    """Documents cut into pieces that fit a row, pieces packed into rows; a row's documents never see each other."""

    isolated = True

    def __init__(self, shards: TokenShards, framing: Framing, seed: int) -> None:
        self.framing = framing
        self._shards = shards
        self._has_eod = shards.manifest["end_of_document"] is not None
        documents_D = weighted_documents(shards)
        # Input tokens a document offers. Causal: every token is predicted, the first from `begin` if there is one,
        # and the last is only ever predicted. Masked: its text without the end-of-document token.
        trim = (framing.begin is None) if framing.causal else self._has_eod
        inputs_D = np.maximum(shards.lengths_D[documents_D] - int(trim), 0)
        self._document_P, self._start_P, self._length_P = _cut(
            documents_D, inputs_D, framing.row_length - framing.overhead
        )
        self._piece_order, self._row_offsets = pack(
            self._length_P + framing.overhead, framing.row_length, np.random.default_rng([seed, 0x9ACC])
        )

    def __len__(self) -> int:
        return len(self._row_offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows, padding not counted."""
        return int(self._length_P.sum()) + len(self._length_P) * self.framing.overhead

    def row(self, index: int, epoch: int) -> Row:
        """Row `index`; the same in every epoch."""
        length, count = self.framing.row_length, self._count_T
        row = Row(np.full(length, self._fill), np.zeros(length, np.int64), count.copy(), np.full(length, NO_TARGET))
        at = 0
        pieces = self._piece_order[self._row_offsets[index] : self._row_offsets[index + 1]]
        for segment, piece in enumerate(pieces.tolist(), start=1):
            stop = self._write_piece(piece, row, at)
            row.segments[at:stop] = segment
            row.positions[at:stop] = count[: stop - at]
            at = stop
        row.positions[at:] = count[: length - at]
        return row

    @functools.cached_property
    def _count_T(self) -> Ints:
        return np.arange(self.framing.row_length)

    @functools.cached_property
    def _fill(self) -> int:
        """What stands behind the last document of a row, where nobody sees it.

        Causal models get no mask, as transformers finds the borders of documents only without one (masking_utils.py);
        it then warns of padding tokens, so that theirs is another.
        """
        return self._shards.manifest["end_of_document"] if self.framing.causal and self._has_eod else self.framing.pad

    def _write_piece(self, piece: int, row: Row, at: int) -> int:
        """Put a piece into a row from place `at` on; returns the place behind it."""
        framing = self.framing
        document, start = int(self._document_P[piece]), int(self._start_P[piece])
        stop = start + int(self._length_P[piece])
        end = at + stop - start + framing.overhead
        if not framing.causal:
            first, last = at, end
            if framing.begin is not None:
                row.input_ids[at], first = framing.begin, at + 1
            if framing.end is not None:
                row.input_ids[end - 1], last = framing.end, end - 1
            row.input_ids[first:last] = self._shards.read(document, start, stop)
            return end
        if framing.begin is None:
            tokens = self._shards.read(document, start, stop + 1)
        elif start == 0:
            tokens = np.concatenate([np.array([framing.begin], np.int64), self._shards.read(document, 0, stop)])
        else:
            tokens = self._shards.read(document, start - 1, stop)
        row.input_ids[at:end], row.targets[at:end] = tokens[:-1], tokens[1:]
        return end


class StreamRows:
    """All documents as one long stream, cut into rows; where the cuts fall moves with the epoch, as far as one row."""

    isolated = False

    def __init__(self, shards: TokenShards, framing: Framing, seed: int) -> None:
        self.framing = framing
        self._shards = shards
        self._seed = seed
        self._documents_D = weighted_documents(shards)
        self._starts_D = np.concatenate([[0], np.cumsum(shards.lengths_D[self._documents_D])])

    def __len__(self) -> int:
        # One row is kept free for the shift and one token for the last target.
        return max(0, (self.num_tokens - 1) // self.framing.row_length - 1)

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream."""
        return int(self._starts_D[-1])

    def row(self, index: int, epoch: int) -> Row:
        """Row `index` of `epoch`."""
        length = self.framing.row_length
        shift = int(np.random.default_rng([self._seed, 0x5417, epoch]).integers(length))
        tokens = self._read(shift + index * length, length + 1)
        ones = np.ones(length, dtype=np.int64)
        return Row(tokens[:-1], ones, np.arange(length), tokens[1:])

    def _read(self, start: int, count: int) -> Ints:
        parts: list[Ints] = []
        place = int(np.searchsorted(self._starts_D, start, side="right")) - 1
        while count > 0:
            offset = start - int(self._starts_D[place])
            part = self._shards.read(int(self._documents_D[place]), offset, offset + count)
            parts.append(part)
            start, count, place = start + len(part), count - len(part), place + 1
        return np.concatenate(parts)


Rows = PackedRows | StreamRows


def weighted_documents(shards: TokenShards) -> Ints:
    """Indices of the documents of one epoch: each as often as its source's weight says.

    A fraction is decided by the document's own digest: a fixed part, which no other document and no seed moves.
    Validation has each document once, or else its figures would not be those of its text (bits per byte).
    """
    if shards.split == "validation":
        return np.arange(len(shards))
    weight_D = np.array([source["weight"] for source in shards.sources], dtype=np.float64)[shards.source_D]
    times_D = np.floor(weight_D)
    if (times_D != weight_D).any():
        times_D = times_D + (shards.digests_D < (weight_D - times_D) * 2.0**64)
    return np.repeat(np.arange(len(shards)), times_D.astype(np.int64))


def pack(length_P: Ints, row_length: int, generator: np.random.Generator) -> tuple[Ints, Ints]:
    """Pack pieces into rows: (piece indices in row order [P], offsets of the rows in it [R + 1]).

    Shortest-pack-first histogram packing (Krell et al. 2021, arXiv:2107.02027), with best fit: it works on the
    counts of lengths, so its time depends on `row_length` and not on the number of pieces. Pieces of equal length
    are interchangeable; `generator` shuffles them.
    """
    if not len(length_P):
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    queues = _shuffled_by_length(length_P, generator)
    compositions = _compositions(np.bincount(length_P, minlength=row_length + 1), row_length)
    taken = dict.fromkeys(queues, 0)
    order: list[Ints] = []
    sizes: list[Ints] = []
    for count, lengths in compositions:
        columns = []
        for length in lengths:
            columns.append(queues[length][taken[length] : taken[length] + count])
            taken[length] += count
        order.append(np.stack(columns, axis=1).reshape(-1))
        sizes.append(np.full(count, len(lengths)))
    return np.concatenate(order), np.concatenate([[0], np.cumsum(np.concatenate(sizes))])


def _shuffled_by_length(length_P: Ints, generator: np.random.Generator) -> dict[int, Ints]:
    shuffled = generator.permutation(len(length_P))
    by_length = shuffled[np.argsort(length_P[shuffled], kind="stable")]
    lengths, starts = np.unique(length_P[by_length], return_index=True)
    stops = np.append(starts[1:], len(by_length))
    return {int(n): by_length[a:b] for n, a, b in zip(lengths, starts, stops, strict=True)}


def _compositions(histogram: Ints, row_length: int) -> list[tuple[int, tuple[int, ...]]]:
    """How many rows of which lengths: longest pieces first, each into the fullest rows that still take it."""
    open_rows: dict[int, list[tuple[int, tuple[int, ...]]]] = {}  # free tokens -> (number of rows, their lengths)
    for length in range(row_length, 0, -1):
        left = int(histogram[length])
        while left:
            free = min((free for free in open_rows if free >= length and open_rows[free]), default=None)
            if free is None:
                _open(open_rows, length, left, row_length)
                break
            count, lengths = open_rows[free].pop()
            used = min(left, count)
            if count > used:
                open_rows[free].append((count - used, lengths))
            open_rows.setdefault(free - length, []).append((used, (*lengths, length)))
            left -= used
    return [group for groups in open_rows.values() for group in groups]


def _open(open_rows: dict[int, list[tuple[int, tuple[int, ...]]]], length: int, pieces: int, row_length: int) -> None:
    each = row_length // length
    for rows, copies in ((pieces // each, each), (1, pieces % each)):
        if rows and copies:
            open_rows.setdefault(row_length - copies * length, []).append((rows, (length,) * copies))


def _cut(documents_D: Ints, inputs_D: Ints, capacity: int) -> tuple[Ints, Ints, Ints]:
    """Cut documents of `inputs_D` tokens into pieces of at most `capacity`: (document, start, length) of each [P]."""
    pieces_D = -(-inputs_D // capacity)
    document_P = np.repeat(documents_D, pieces_D)
    first_P = np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
    start_P = (np.arange(len(document_P)) - first_P) * capacity
    length_P = np.minimum(np.repeat(inputs_D, pieces_D) - start_P, capacity)
    return document_P, start_P, length_P

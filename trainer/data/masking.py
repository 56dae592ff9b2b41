"""Chooses the targets of a masked language model and what stands in their place.
Every draw comes from (seed, epoch, row), so it is the same on any rank, in any order, and after a resume."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trainer.data.packing import NO_TARGET, Row
from trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Devlin et al. 2018 (arXiv:1810.04805), section 3.1: of the targets 80 % become [MASK], 10 % a random token, 10 % stay.
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1


@dataclass(frozen=True)
class Masking:
    """Masks for one vocabulary. V: entries of the vocabulary."""

    seed: int
    probability: float
    mask_id: int
    special_V: NDArray[np.bool_]  # tokens that are never targets
    starts_word_V: NDArray[np.bool_] | None  # None: every token by itself

    @functools.cached_property
    def _ordinary(self) -> NDArray[np.int64]:
        return np.flatnonzero(~self.special_V)

    def apply(self, row: Row, index: int, epoch: int) -> Row:
        """`row` with targets chosen and hidden; `index` and `epoch` name the draw."""
        draw = np.random.Generator(np.random.Philox(key=[self.seed, 0x3A5C], counter=[0, 0, epoch, index]))
        place_N = self._choose(row, draw)
        input_ids, targets = row.input_ids.copy(), np.full_like(row.targets, NO_TARGET)
        targets[place_N] = input_ids[place_N]
        kind_N = draw.random(len(place_N))
        random_N = draw.choice(self._ordinary, len(place_N))
        hidden_N = np.where(kind_N < MASK_SHARE + RANDOM_SHARE, random_N, input_ids[place_N])
        input_ids[place_N] = np.where(kind_N < MASK_SHARE, self.mask_id, hidden_N)
        return Row(input_ids, row.segments, row.positions, targets)

    def _choose(self, row: Row, draw: np.random.Generator) -> NDArray[np.int64]:
        """Positions of the targets: whole words in random order until the row's share is reached.

        A word longer than the whole share (Chinese text, minified code) gives tokens within it if it is drawn first.
        """
        place_E = np.flatnonzero((row.segments > 0) & ~self.special_V[row.input_ids])
        if not len(place_E):
            return place_E
        budget = max(1, round(self.probability * len(place_E)))
        start_W = np.flatnonzero(self._begins_word(row, place_E))
        order_W = draw.permutation(len(start_W))
        length_W = (np.append(start_W[1:], len(place_E)) - start_W)[order_W]
        start_W = start_W[order_W]
        if length_W[0] > budget:
            return np.sort(draw.choice(place_E[start_W[0] : start_W[0] + length_W[0]], budget, replace=False))
        fits_W = _first_that_fit(length_W, budget)
        start_W, length_W = start_W[fits_W], length_W[fits_W]
        within_N = np.arange(length_W.sum()) - np.repeat(np.cumsum(length_W) - length_W, length_W)
        return np.sort(place_E[np.repeat(start_W, length_W) + within_N])

    def _begins_word(self, row: Row, place_E: NDArray[np.int64]) -> NDArray[np.bool_]:
        if self.starts_word_V is None:
            return np.ones(len(place_E), dtype=np.bool_)
        begins_E = self.starts_word_V[row.input_ids[place_E]]
        begins_E[0] = True
        begins_E[1:] |= place_E[1:] - place_E[:-1] != 1
        return begins_E


def _first_that_fit(length_W: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Indices of the lengths, in their order, that still fit what those before them left of `budget`."""
    ends_W = np.cumsum(length_W)
    fits = int(np.searchsorted(ends_W, budget, side="right"))
    chosen, left = list(range(fits)), budget - (int(ends_W[fits - 1]) if fits else 0)
    while left and (later := np.flatnonzero(length_W[fits:] <= left)).size:
        fits += int(later[0])
        chosen.append(fits)
        left -= int(length_W[fits])
        fits += 1
    return np.array(chosen, dtype=np.int64)


def masking(tokenizer: "PreTrainedTokenizerBase", probability: float, whole_word: bool, seed: int) -> Masking:
    """Masking for a tokenizer; UserError if it has no mask token."""
    mask_id = tokenizer.mask_token_id
    if not isinstance(mask_id, int):
        raise UserError(
            "the tokenizer has no mask token", "one for masked_lm", "train a wordpiece tokenizer, or load one"
        )
    special_V = np.zeros(len(tokenizer), dtype=np.bool_)
    special_V[tokenizer.all_special_ids] = True
    starts = word_starts(tokenizer) if whole_word else None
    return Masking(seed, probability, mask_id, special_V, starts)


def word_starts(tokenizer: "PreTrainedTokenizerBase") -> NDArray[np.bool_]:
    """For each entry of the vocabulary [V], whether it begins a word, by the marks the tokenizer's kind uses.

    WordPiece marks what continues a word (##), byte-level BPE and SentencePiece mark the space before one.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if any(token.startswith("##") for token in tokens):
        return np.array([not token.startswith("##") for token in tokens])
    marks = ("\u0120", "\u010a", "\u2581")  # a space and a newline as byte-level BPE writes them, SentencePiece's space
    starts = np.array([token.startswith(marks) for token in tokens])
    return starts if starts.any() else np.ones(len(tokens), dtype=np.bool_)

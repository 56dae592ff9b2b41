"""Chooses the targets of a masked language model and what stands in their place.
Every draw comes from (seed, epoch, row), so it is the same on any rank, in any order, and after a resume."""

import functools
from collections.abc import Sequence
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


# What a position's draws are for; each has its own.
_ORDER, _KIND, _TOKEN, _WITHIN = range(4)


@dataclass(frozen=True)
class Masking:
    """Masks for one vocabulary.

    Shapes: V entries of the vocabulary, B rows, T tokens in a row, E tokens of all rows that may be targets, W words of
    them, N targets.
    """

    seed: int
    probability: float
    mask_id: int
    special_V: NDArray[np.bool_]  # tokens that are never targets
    starts_word_V: NDArray[np.bool_] | None  # None: every token by itself

    @functools.cached_property
    def _ordinary(self) -> NDArray[np.int64]:
        return np.flatnonzero(~self.special_V)

    def apply(self, rows: Row, index_B: Sequence[int], epoch_B: Sequence[int]) -> Row:
        """`rows`, arrays [B, T], with targets chosen and hidden; `index_B` and `epoch_B` name the draws."""
        draws = _Draws(self.seed, index_B, epoch_B, rows.input_ids.shape[1])
        place_N = self._choose(rows, draws)
        input_ids, targets = rows.input_ids.copy(), np.full_like(rows.targets, NO_TARGET)
        token_N = input_ids.reshape(-1)[place_N]
        targets.reshape(-1)[place_N] = token_N
        kind_N = draws.uniform(_KIND, place_N)
        random_N = self._ordinary[(draws.uniform(_TOKEN, place_N) * len(self._ordinary)).astype(np.int64)]
        hidden_N = np.where(kind_N < MASK_SHARE + RANDOM_SHARE, random_N, token_N)
        input_ids.reshape(-1)[place_N] = np.where(kind_N < MASK_SHARE, self.mask_id, hidden_N)
        return Row(input_ids, rows.segments, rows.positions, targets)

    def _choose(self, rows: Row, draws: "_Draws") -> NDArray[np.int64]:
        """Places [B * T] of the targets: of each row whole words in random order until its share is reached.

        A word longer than the whole share (Chinese text, minified code) gives tokens within it if it is drawn first.
        """
        maskable_BT = (rows.segments > 0) & ~self.special_V[rows.input_ids]
        place_E = np.flatnonzero(maskable_BT)
        if not len(place_E):
            return place_E
        budget_B = np.maximum(1, np.rint(self.probability * maskable_BT.sum(axis=1))).astype(np.int64)
        start_W = np.flatnonzero(self._begins_word(rows, place_E))
        length_W = np.diff(start_W, append=len(place_E))
        row_W = place_E[start_W] // draws.row_length
        order_W = np.argsort(row_W + draws.uniform(_ORDER, place_E[start_W]))
        start_W, length_W, row_W = start_W[order_W], length_W[order_W], row_W[order_W]
        ends_W = np.cumsum(length_W)
        first_B = np.searchsorted(row_W, np.arange(len(budget_B)))
        used_W = ends_W - np.append(0, ends_W)[first_B][row_W]
        taken_W = used_W <= budget_B[row_W]
        place_N = [_drawn_within(place_E[start_W[at] : start_W[at] + length_W[at]], budget_B[row_W[at]], draws)
                   for at in np.flatnonzero((used_W == length_W) & ~taken_W)]  # fmt: skip
        left_B = budget_B - np.bincount(row_W, length_W * taken_W, len(budget_B)).astype(np.int64)
        left_B[row_W[(used_W == length_W) & ~taken_W]] = 0
        while (fits := np.flatnonzero(~taken_W & (length_W <= left_B[row_W]))).size:
            next_R = fits[np.unique(row_W[fits], return_index=True)[1]]  # of each row the first that fits what is left
            taken_W[next_R] = True
            left_B[row_W[next_R]] -= length_W[next_R]
        start_W, length_W = start_W[taken_W], length_W[taken_W]
        within_N = np.arange(length_W.sum()) - np.repeat(np.cumsum(length_W) - length_W, length_W)
        return np.sort(np.concatenate([place_E[np.repeat(start_W, length_W) + within_N], *place_N]))

    def _begins_word(self, rows: Row, place_E: NDArray[np.int64]) -> NDArray[np.bool_]:
        if self.starts_word_V is None:
            return np.ones(len(place_E), dtype=np.bool_)
        begins_E = self.starts_word_V[rows.input_ids.reshape(-1)[place_E]] | (place_E % rows.input_ids.shape[1] == 0)
        begins_E[0] = True
        begins_E[1:] |= place_E[1:] - place_E[:-1] != 1
        return begins_E


def _drawn_within(place_N: NDArray[np.int64], count: int, draws: "_Draws") -> NDArray[np.int64]:
    return place_N[np.argsort(draws.uniform(_WITHIN, place_N))[:count]]


class _Draws:
    """Random numbers of every position of rows, by SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
    pseudorandom number generators"), which needs no state: only what is looked at is computed, of all rows at once."""

    def __init__(self, seed: int, index_B: Sequence[int], epoch_B: Sequence[int], row_length: int) -> None:
        self.row_length = row_length
        key = _scrambled(np.array([seed], dtype=np.uint64))
        key_B = _scrambled(key ^ np.array(epoch_B, dtype=np.uint64))
        self._key_B = _scrambled(key_B ^ np.array(index_B, dtype=np.uint64))

    def uniform(self, kind: int, place_N: NDArray[np.int64]) -> NDArray[np.float64]:
        """In [0, 1), of the places [B * T], for one of the kinds of draws."""
        row_N, at_N = np.divmod(place_N, self.row_length)
        count_N = (4 * at_N + kind).astype(np.uint64)
        bits_N = _scrambled(self._key_B[row_N] + count_N * _STEP) >> np.uint64(11)
        return bits_N.astype(np.float64) * 2.0**-53


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _scrambled(state_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's next number of each state."""
    state_N = state_N + _STEP
    state_N = (state_N ^ (state_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state_N = (state_N ^ (state_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state_N ^ (state_N >> np.uint64(31))


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

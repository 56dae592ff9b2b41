import numpy as np
import pytest

from trainer.data.masking import masking, word_starts
from trainer.data.packing import NO_TARGET, Framing, PackedRows, Row
from trainer.errors import UserError


@pytest.fixture
def row(tokens_in_memory):
    """128 tokens: words of one to three pieces, [CLS] and [SEP] around two documents."""
    draw = np.random.default_rng(0)

    def text(length):
        out = []
        while len(out) < length:
            out += [int(draw.integers(5, 60)), *map(int, draw.integers(60, 100, size=draw.integers(0, 3)))]
        return out[:length]

    return PackedRows(tokens_in_memory([text(70), text(50)]), Framing(128, False, 2, 3, 0), seed=0).row(0, 0)


def apply(mask, row, index, epoch):
    """A row by itself."""
    masked = mask.apply(Row.stack([row]), [index], [epoch])
    return Row(masked.input_ids[0], masked.segments[0], masked.positions[0], masked.targets[0])


def test_targets_are_the_hidden_tokens_and_nothing_special(row, tiny_tokenizer):
    masked = apply(masking(tiny_tokenizer, 0.15, True, seed=1), row, 0, 0)
    chosen = masked.targets != NO_TARGET
    assert (masked.targets[chosen] == row.input_ids[chosen]).all()
    assert (masked.input_ids[~chosen] == row.input_ids[~chosen]).all()
    assert not np.isin(row.input_ids[chosen], [0, 1, 2, 3, 4]).any()
    assert chosen.sum() == pytest.approx(0.15 * 120, abs=2)


def test_whole_words_are_hidden_together(row, tiny_tokenizer):
    for index in range(50):
        chosen = apply(masking(tiny_tokenizer, 0.15, True, seed=1), row, index, 0).targets != NO_TARGET
        continues = row.input_ids >= 60
        for at in np.flatnonzero(continues[1:]) + 1:
            if row.segments[at] == row.segments[at - 1] and row.input_ids[at - 1] >= 5:
                assert chosen[at] == chosen[at - 1]


@pytest.mark.parametrize("lengths", [[100], [60, 60], [90, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
def test_a_word_longer_than_the_share_gives_no_more_than_the_share(tokens_in_memory, tiny_tokenizer, lengths):
    text = sum(([7, *[70] * (length - 1)] for length in lengths), [])
    row = PackedRows(tokens_in_memory([text]), Framing(128, False, 2, 3, 0), seed=0).row(0, 0)
    mask, inside = masking(tiny_tokenizer, 0.15, True, seed=1), set()
    for index in range(600):
        places = np.flatnonzero(apply(mask, row, index, 0).targets != NO_TARGET)
        assert 0 < len(places) <= round(0.15 * len(text))
        inside.update(places.tolist())
    assert len(inside) == len(text)  # and every token of it is a target now and then


def test_single_tokens_are_hidden_alone_when_asked(row, tiny_tokenizer):
    split = 0
    for index in range(20):
        chosen = apply(masking(tiny_tokenizer, 0.15, False, seed=1), row, index, 0).targets != NO_TARGET
        split += int(((row.input_ids[1:] >= 60) & (chosen[1:] != chosen[:-1])).sum())
    assert split > 0


def test_shares_are_80_10_10(row, tiny_tokenizer):
    mask = masking(tiny_tokenizer, 0.15, False, seed=1)
    masked = random = kept = 0
    for index in range(800):
        out = apply(mask, row, index, 0)
        chosen = out.targets != NO_TARGET
        masked += (out.input_ids[chosen] == 4).sum()
        kept += (out.input_ids[chosen] == row.input_ids[chosen]).sum()
        random += ((out.input_ids[chosen] != 4) & (out.input_ids[chosen] != row.input_ids[chosen])).sum()
    total = masked + random + kept
    assert masked / total == pytest.approx(0.8, abs=0.01)
    assert random / total == pytest.approx(0.1, abs=0.01)
    assert kept / total == pytest.approx(0.1, abs=0.01)


def test_draws_depend_on_seed_epoch_and_row_only(row, tiny_tokenizer):
    def draw(seed, index, epoch):
        return apply(masking(tiny_tokenizer, 0.15, True, seed), row, index, epoch).targets

    assert (draw(1, 7, 2) == draw(1, 7, 2)).all()
    for other in ((2, 7, 2), (1, 8, 2), (1, 7, 3)):
        assert (draw(1, 7, 2) != draw(*other)).any()


@pytest.mark.parametrize("whole_word", [True, False])
def test_a_row_is_masked_alike_alone_and_among_others(tokens_in_memory, tiny_tokenizer, whole_word):
    """Whatever the others are: full, padded, of one long word, without a token that may be a target."""
    draw = np.random.default_rng(1)
    texts = [draw.integers(5, 100, 126).tolist(), [7, 70, 8], [7, *[70] * 125], [4] * 126]
    rows = [PackedRows(tokens_in_memory([text]), Framing(128, False, 2, 3, 0), seed=0).row(0, 0) for text in texts]
    bare = [[70, 71, *range(5, 60), *range(5, 60), *range(5, 21)], [70] * 128]  # no [CLS]: a word ends with its row
    rows += [
        PackedRows(tokens_in_memory([text]), Framing(128, False, None, None, 0), seed=0).row(0, 0) for text in bare
    ]
    mask = masking(tiny_tokenizer, 0.15, whole_word, seed=3)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0], [3, 3], [4, 4, 5], [5, 4]):
        together = mask.apply(Row.stack([rows[at] for at in order]), [10 + at for at in order], [at for at in order])
        for place, at in enumerate(order):
            alone = apply(mask, rows[at], 10 + at, at)
            assert (together.input_ids[place] == alone.input_ids).all()
            assert (together.targets[place] == alone.targets).all()
    assert [int((apply(mask, row, 0, 0).targets != NO_TARGET).sum()) for row in rows] == [19, 1, 19, 0, 19, 19]


def test_every_token_is_a_target_and_a_replacement_equally_often(row, tiny_tokenizer):
    """Within what chance allows: chi squared, at its degrees of freedom plus five of its deviations."""
    mask, rounds = masking(tiny_tokenizer, 0.15, False, seed=1), 3000
    rows = mask.apply(Row.stack([row] * rounds), range(rounds), [0] * rounds)
    hidden_RT = rows.targets != NO_TARGET
    maskable_T = (row.segments > 0) & ~np.isin(row.input_ids, [0, 1, 2, 3, 4])
    count_T = hidden_RT.sum(axis=0)[maskable_T]
    replaced_RT = hidden_RT & (rows.input_ids != 4) & (rows.input_ids != row.input_ids)
    _, count_V = np.unique(rows.input_ids[replaced_RT], return_counts=True)
    pairs = hidden_RT[:, maskable_T][:, :-1] & hidden_RT[:, maskable_T][:, 1:]  # neighbours are not drawn together
    for count in (count_T, count_V):
        chi2 = ((count - count.mean()) ** 2 / count.mean()).sum()
        assert chi2 < len(count) - 1 + 5 * np.sqrt(2 * len(count))
    assert len(count_V) == len(tiny_tokenizer) - 5
    assert pairs.mean() == pytest.approx(18 / 120 * 17 / 119, rel=0.1)  # as of 18 places of 120


def test_word_starts_of_wordpiece(tiny_tokenizer):
    starts = word_starts(tiny_tokenizer)
    assert starts[:60].all() and not starts[60:].any()


def test_a_tokenizer_without_a_mask_is_refused(tiny_tokenizer):
    import copy

    bare = copy.deepcopy(tiny_tokenizer)
    bare.mask_token = None
    with pytest.raises(UserError, match="no mask token"):
        masking(bare, 0.15, True, 0)

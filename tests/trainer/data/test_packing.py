import numpy as np
import pytest

from trainer.data.packing import NO_TARGET, Framing, PackedRows, StreamRows, pack, weighted_documents

MASKED = Framing(row_length=16, causal=False, begin=2, end=3, pad=0)
CAUSAL = Framing(row_length=16, causal=True, begin=1, end=None, pad=0)


def documents(lengths, first=10):
    """Documents of the given lengths in which every token is different."""
    out, at = [], first
    for length in lengths:
        out.append(list(range(at, at + length)))
        at += length
    return out


def segments_of(row):
    return [row.input_ids[row.segments == number] for number in range(1, row.segments.max() + 1)]


@pytest.mark.parametrize("seed", range(5))
def test_pack_uses_every_piece_once_and_never_overfills(seed):
    lengths = np.random.default_rng(seed).integers(1, 129, size=700)
    order, offsets = pack(lengths, 128, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(lengths)))
    sums = np.add.reduceat(lengths[order], offsets[:-1])
    assert sums.max() <= 128
    fewest = max(-(-lengths.sum() // 128), (lengths > 64).sum())  # no packing can do with less
    assert len(sums) <= 1.03 * fewest


def test_pack_of_nothing_is_no_row():
    order, offsets = pack(np.zeros(0, np.int64), 128, np.random.default_rng(0))
    assert len(order) == 0 and list(offsets) == [0]


def test_pack_is_a_pure_function_of_its_seed():
    lengths = np.random.default_rng(0).integers(1, 65, size=300)
    once, again, other = (pack(lengths, 64, np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert (once == again).all() and (once != other).any()


def test_masked_rows_hold_every_text_token_once_between_cls_and_sep(tokens_in_memory):
    texts = documents([5, 40, 1, 13, 14, 15, 3, 3])
    rows = PackedRows(tokens_in_memory(texts), MASKED, seed=0)
    seen = []
    for index in range(len(rows)):
        for piece in segments_of(rows.row(index, 0)):
            assert piece[0] == 2 and piece[-1] == 3
            seen += list(piece[1:-1])
    assert sorted(seen) == sorted(sum(texts, []))


def test_masked_rows_leave_the_end_of_document_out(tokens_in_memory):
    shards = tokens_in_memory([[10, 11, 9], [12, 9]], end_of_document=9)
    row = PackedRows(shards, MASKED, seed=0).row(0, 0)
    assert sorted(row.input_ids[row.segments > 0]) == [2, 2, 3, 3, 10, 11, 12]


def test_causal_rows_predict_every_token_once_and_only_inside_its_document(tokens_in_memory):
    texts = documents([5, 40, 1, 13, 16, 17, 32, 3])
    after = {b: a for text in texts for a, b in zip([1, *text], text, strict=False)}
    rows = PackedRows(tokens_in_memory(texts), CAUSAL, seed=0)
    predicted = []
    for index in range(len(rows)):
        row = rows.row(index, 0)
        for given, target in zip(row.input_ids, row.targets, strict=True):
            if target != NO_TARGET:
                predicted.append(target)
                assert given == after[target]
        assert ((row.targets != NO_TARGET) == (row.segments > 0)).all()
    assert sorted(predicted) == sorted(sum(texts, []))


def test_causal_rows_are_filled_up_with_ends_of_documents_and_masked_ones_with_padding(tokens_in_memory):
    shards = tokens_in_memory([[10, 11, 9], [12, 9]], end_of_document=9)
    for framing, fill in ((CAUSAL, 9), (MASKED, 0)):
        row = PackedRows(shards, framing, seed=0).row(0, 0)
        behind = row.segments == 0
        assert behind.any() and (row.input_ids[behind] == fill).all() and (row.targets[behind] == NO_TARGET).all()


def test_causal_rows_without_a_begin_token_leave_each_first_token_unpredicted(tokens_in_memory):
    texts = documents([5, 20])
    framing = Framing(16, True, None, None, 0)
    rows = PackedRows(tokens_in_memory(texts), framing, seed=0)
    predicted = [t for i in range(len(rows)) for t in rows.row(i, 0).targets if t != NO_TARGET]
    assert sorted(predicted) == sorted(texts[0][1:] + texts[1][1:])


def test_positions_begin_anew_in_every_document(tokens_in_memory):
    row = PackedRows(tokens_in_memory(documents([3, 4, 2])), MASKED, seed=0).row(0, 0)
    for number in range(1, row.segments.max() + 1):
        inside = row.positions[row.segments == number]
        assert list(inside) == list(range(len(inside)))


def test_stream_rows_follow_the_text_and_shift_with_the_epoch(tokens_in_memory):
    text = documents([7, 50, 100, 1, 42])
    rows = StreamRows(tokens_in_memory(text), CAUSAL, seed=0)
    whole = sum(text, [])
    starts = set()
    for epoch in range(8):
        row = rows.row(2, epoch)
        start = whole.index(row.input_ids[0])
        starts.add(start)
        assert list(row.input_ids) == whole[start : start + 16]
        assert list(row.targets) == whole[start + 1 : start + 17]
        assert 32 <= start < 48
    assert len(starts) > 3
    assert list(rows.row(len(rows) - 1, 3).targets)  # the last row never reads past the end
    assert all(len(rows.row(len(rows) - 1, epoch).targets) == 16 for epoch in range(20))


def weighted(tokens_in_memory, weights, count=1000, split="train"):
    """Documents of two sources one after the other, each with its own text."""
    return tokens_in_memory(
        [[number] for number in range(2 * count)],
        sources=[{"name": str(index), "weight": weight} for index, weight in enumerate(weights)],
        source_D=np.repeat(np.array([0, 1], np.uint16), count),
        split=split,
    )


def test_weights_repeat_documents_and_take_fractions(tokens_in_memory):
    times = np.bincount(weighted_documents(weighted(tokens_in_memory, (2.0, 0.25))), minlength=2000)
    assert (times[:1000] == 2).all()
    assert set(times[1000:]) == {0, 1} and 210 < times[1000:].sum() < 290
    times = np.bincount(weighted_documents(weighted(tokens_in_memory, (1.25, 3.0))), minlength=2000)
    assert set(times[:1000]) == {1, 2} and 1210 < times[:1000].sum() < 1290


def test_a_larger_fraction_holds_the_smaller_one(tokens_in_memory):
    small, large = (set(weighted_documents(weighted(tokens_in_memory, (1.0, part)))) for part in (0.25, 0.5))
    assert small < large


def test_a_document_more_moves_no_other_in_or_out(tokens_in_memory):
    def chosen(texts):
        shards = tokens_in_memory(texts, sources=[{"name": "a", "weight": 0.5}])
        return {shards.documents[index][0] for index in weighted_documents(shards)}

    texts = [[number] for number in range(400)]
    assert chosen([[1000], *texts[::-1]]) - {1000} == chosen(texts)


@pytest.mark.parametrize("kind", [PackedRows, StreamRows])
def test_validation_has_each_document_once_whatever_its_weight(tokens_in_memory, kind):
    """The number of its tokens is that of its text, by which bits per byte are worked out."""
    for weights in ((2.0, 0.25), (1.0, 1.0)):
        rows = kind(weighted(tokens_in_memory, weights, split="validation"), CAUSAL, seed=0)
        assert rows.num_tokens == 2000

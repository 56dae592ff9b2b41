import itertools

import numpy as np
import pytest

from trainer.data.masking import masking
from trainer.data.packing import Framing, PackedRows
from trainer.data.stream import BatchPlan, TrainStream, validation_batches
from trainer.errors import UserError

FRAMING = Framing(32, False, 2, 3, 0)


@pytest.fixture
def rows(tokens_in_memory):
    draw = np.random.default_rng(0)
    texts = [list(map(int, draw.integers(5, 100, size=draw.integers(3, 60)))) for _ in range(60)]
    return PackedRows(tokens_in_memory(texts), FRAMING, seed=0)


def streams(rows, tokenizer, world, micro, batch=12):
    mask = masking(tokenizer, 0.15, True, seed=5)
    return [TrainStream(rows, mask, BatchPlan(batch, micro, rank, world), seed=5) for rank in range(world)]


def step_contents(parts, step):
    """sample id -> bytes of its row, over all ranks and micro-batches."""
    seen = {}
    for stream in parts:
        for batch in stream.micro_batches(step):
            for place, sample in enumerate(batch.sample_ids):
                assert sample not in seen
                seen[sample] = (batch.input_ids[place].numpy().tobytes(), batch.segments[place].numpy().tobytes())
    return seen


@pytest.mark.parametrize(("world", "micro"), [(1, 3), (2, 6), (2, 2), (3, 4), (4, 1)])
def test_a_step_holds_the_same_samples_whatever_the_ranks(rows, tiny_tokenizer, world, micro):
    for step in (0, 1, 7, 8, 9):
        reference = step_contents(streams(rows, tiny_tokenizer, 1, 12), step)
        assert step_contents(streams(rows, tiny_tokenizer, world, micro), step) == reference
        assert set(reference) == set(range(12 * step, 12 * step + 12))


def test_a_step_is_the_same_when_reached_by_another_way(rows, tiny_tokenizer):
    (walked,), (jumped,) = streams(rows, tiny_tokenizer, 1, 4), streams(rows, tiny_tokenizer, 1, 4)
    for step in range(9):
        walked.micro_batches(step)
        walked.make_ahead(step + 1)
    jumped.make_ahead(4)  # of another step than it is asked for, as after a rewind
    assert step_contents([walked], 9) == step_contents([jumped], 9)


def test_an_epoch_sees_each_row_once_and_the_next_another_order(rows, tiny_tokenizer):
    (stream,) = streams(rows, tiny_tokenizer, 1, 1, batch=1)
    first, second = ([stream.micro_batches(e * len(rows) + at)[0] for at in range(len(rows))] for e in (0, 1))

    def keys(batches):
        return [tuple(batch.positions[0].tolist()) + (batch.num_tokens,) for batch in batches]

    assert sorted(keys(first)) == sorted(keys(second))
    assert keys(first) != keys(second)


def test_targets_point_into_the_flattened_batch(rows, tiny_tokenizer):
    (stream,) = streams(rows, tiny_tokenizer, 1, 12)
    (batch,) = stream.micro_batches(0)
    assert batch.num_targets == len(batch.target_places) > 0
    assert batch.segments.flatten()[batch.target_places].min() > 0
    assert batch.num_tokens == int((batch.segments > 0).sum())


def test_boundaries_are_where_a_row_or_its_document_changes(rows, tiny_tokenizer):
    (stream,) = streams(rows, tiny_tokenizer, 1, 12)
    (batch,) = stream.micro_batches(0)
    flat = [(row, segment) for row, segments in enumerate(batch.segments.tolist()) for segment in segments]
    expected = [at for at in range(len(flat)) if at == 0 or flat[at] != flat[at - 1]] + [len(flat)]
    assert batch.boundaries.tolist() == expected and len(expected) > 12 + 1
    assert batch.longest == max(stop - start for start, stop in itertools.pairwise(expected))


def test_a_batch_that_does_not_divide_names_legal_values():
    with pytest.raises(UserError) as error:
        BatchPlan(global_batch_size=30, micro_batch_size=4, rank=0, world=2)
    assert "nearest: 24, 32, 40" in str(error.value)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_counts_each_row_once_on_any_number_of_ranks(rows, tiny_tokenizer, world):
    mask = masking(tiny_tokenizer, 0.15, True, seed=5)
    shares = [
        list(validation_batches(rows, mask, BatchPlan(12, 2, rank, world), 15, seed=5)()) for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1  # a forward may be a collective
    counted = [batch for share in shares for batch in share if batch.num_targets]
    alone = list(validation_batches(rows, mask, BatchPlan(12, 2, 0, 1), 15, seed=5)())
    assert sorted(s for b in counted for s in b.sample_ids) == sorted(s for b in alone for s in b.sample_ids)
    assert sum(b.num_targets for b in counted) == sum(b.num_targets for b in alone)
    assert sum(b.num_tokens for share in shares for b in share) == sum(b.num_tokens for b in alone)


def test_validation_is_the_same_at_each_call(rows, tiny_tokenizer):
    batches = validation_batches(rows, masking(tiny_tokenizer, 0.15, True, 5), BatchPlan(12, 4, 0, 1), None, seed=5)
    once, again = list(batches()), list(batches())
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(once, again, strict=True))


def test_too_little_text_is_a_clear_error(tokens_in_memory):
    empty = PackedRows(tokens_in_memory([]), FRAMING, seed=0)
    with pytest.raises(UserError, match="fills not one row"):
        TrainStream(empty, None, BatchPlan(4, 4, 0, 1), seed=0)

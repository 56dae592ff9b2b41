"""Lamb on tensors that lie in pieces, against Lamb on whole ones: ranks as threads, then as two gloo processes."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.distributed.lamb_ranks import tiny_model, train
from tests.distributed.zero_shards import NOISE, cut, joined, padding, train_rank
from tests.reference_optimizers import SETTINGS, assert_close, problem
from tests.reference_optimizers import train as train_whole
from trainer.engine.lamb import Lamb, Segments

ROOT = Path(__file__).parents[2]


class SumOverThreads:
    """Ranks that are threads: each adds its tensor, and all take the sum."""

    def __init__(self, world):
        self._given = [torch.empty(0)] * world
        self._barrier = threading.Barrier(world, timeout=60)

    def of(self, rank):
        def reduce(squares):
            self._given[rank] = squares.clone()
            self._barrier.wait()
            squares.copy_(sum(self._given))
            self._barrier.wait()

        return reduce


def train_threads(kind, world, synchronised=True, sharded=True):
    together = SumOverThreads(world)
    reduces = [together.of(rank) if synchronised else lambda squares: None for rank in range(world)]
    with ThreadPoolExecutor(world) as pool:
        ranks = [pool.submit(train_rank, kind, rank, world, reduces[rank], sharded) for rank in range(world)]
        return [rank.result() for rank in ranks]


def whole():
    return train_whole(lambda groups: Lamb(groups, **SETTINGS), *problem())


def test_the_shards_of_this_test_have_what_makes_them_hard():
    """A tensor on two ranks, padding between pieces and after them, a rank without a tensor and one without any."""
    (first, size), (second, _), _ = cut("zero1", [561, 24, 8000], 3)
    assert {piece.index for piece in first} & {piece.index for piece in second} == {2}
    assert [[piece.index for piece in pieces] for pieces, _ in cut("zero1", [1], 3)] == [[0], [], []]
    assert cut("zero1", [561, 24, 8000], 3)[2][0][-1].stop < size
    last, _ = cut("zero3", [561, 25], 2)[1]
    assert last[0].stop < last[1].start
    assert [[piece.index for piece in pieces] for pieces, _ in cut("zero3", [1], 2)] == [[0], []]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["zero1", "zero3"])
def test_flat_shards_step_as_whole_tensors(kind, world):
    flats = train_threads(kind, world)
    assert_close(joined(kind, flats), whole(), rtol=1e-6, atol=1e-6)
    assert (padding(kind, flats) == NOISE).all()


@pytest.mark.parametrize("fault", [{"synchronised": False}, {"sharded": False}], ids=str)
def test_norms_of_one_rank_or_of_flat_tensors_are_seen(fault):
    """What Lamb would do without the sum over ranks, and without knowing of shards at all."""
    flats = train_threads("zero1", 2, **fault)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(joined("zero1", flats), whole(), rtol=1e-2, atol=1e-3)
    assert (padding("zero1", flats) == NOISE).all() == ("sharded" not in fault)


@pytest.mark.parametrize("pieces", [((0, 0, 3), (1, 2, 4)), ((0, 0, 6),)], ids=["overlapping", "too long"])
def test_impossible_segments_are_refused(pieces):
    flat = torch.nn.Parameter(torch.ones(5))
    flat.grad = torch.ones(5)
    lamb = Lamb([flat])
    lamb.shard(lambda tensor: Segments(pieces, 2), lambda squares: None)
    with pytest.raises(AssertionError, match="pieces"):
        lamb.step()


def on_two_ranks(script, out, timeout_s):
    """What each of two gloo ranks wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, Path(__file__).with_name(script), out],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{out}.{rank}") for rank in (0, 1)]


def trained_alone():
    model = tiny_model()
    train(model)
    return dict(model.named_parameters())


def test_two_gloo_ranks_step_as_one_process(tmp_path):
    ranks = on_two_ranks("lamb_ranks.py", tmp_path / "results", timeout_s=120)
    for kind in ("zero1", "zero3"):
        assert_close(joined(kind, [rank[kind] for rank in ranks]), whole(), rtol=1e-6, atol=1e-6)
    expected = trained_alone()
    for rank in ranks:
        assert rank["fsdp2"].keys() == expected.keys()
        assert_close(rank["fsdp2"].values(), expected.values())
    with pytest.raises(AssertionError, match="not close"):
        assert_close(joined("zero1", [rank["unsynchronised zero1"] for rank in ranks]), whole(), rtol=1e-2, atol=1e-3)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(ranks[0]["unsynchronised fsdp2"].values(), expected.values(), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_it_is_right_under_deepspeeds_own_zero(tmp_path):
    """The shards of the tests above are drawn after DeepSpeed's source; here they are DeepSpeed's."""
    ranks = on_two_ranks("lamb_deepspeed.py", tmp_path / "results", timeout_s=500)
    expected = trained_alone()
    for rank in ranks:
        not_told = rank.pop("not told")
        for case, weights in rank.items():
            assert weights.keys() == expected.keys(), case
            assert_close(weights.values(), expected.values())
        with pytest.raises(AssertionError, match="not close"):
            assert_close(not_told.values(), expected.values(), rtol=1e-2, atol=1e-3)

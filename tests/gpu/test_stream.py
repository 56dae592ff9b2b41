"""Batches that are brought to the GPU as they are made."""

import numpy as np
import pytest
import torch

from trainer.data.packing import Framing, PackedRows
from trainer.data.stream import BatchPlan, TrainStream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_batches_come_on_the_gpu_and_are_those_of_the_cpu(tokens_in_memory):
    draw = np.random.default_rng(0)
    texts = [list(map(int, draw.integers(5, 100, size=n))) for n in draw.integers(3, 60, size=200)]
    rows = PackedRows(tokens_in_memory(texts), Framing(32, True, 2, None, 0), seed=0)
    device = torch.device("cuda", torch.cuda.current_device())
    there, here = (TrainStream(rows, None, BatchPlan(8, 2, 0, 1), 0, where) for where in (device, torch.device("cpu")))
    for step in range(6):
        for one, two in zip(there.micro_batches(step), here.micro_batches(step), strict=True):
            assert one.to(device) is one
            for name in ("input_ids", "segments", "positions", "boundaries", "target_places", "targets"):
                assert getattr(one, name).device == device
                assert torch.equal(getattr(one, name).cpu(), getattr(two, name))
            assert one.longest == two.longest
        there.make_ahead(step + 1)

import types

import pytest
import torch

from trainer.engine import metrics
from trainer.engine.strategy import StepResult
from trainer.models import TrainFlops
from trainer.objectives.loss import LossSum, Term


def test_the_share_that_waits_for_data_is_a_mean_over_ranks(monkeypatch):
    """A clock that is moved by hand: this rank waits 3 s of 10, the other 5 s."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    ranks = types.SimpleNamespace(
        sum=lambda values, doing: [*(2 * value for value in values[:-1]), values[-1] + 5.0],
        gather=lambda value: [value, 1.5 * value],
    )
    engine = types.SimpleNamespace(
        world=2, ranks=ranks, device=torch.device("cpu"), peak_memory_gib=lambda: None, loss_scale=lambda: None
    )
    meter = metrics.Meter(engine, TrainFlops(1.0, 1.0), None)
    with meter.waiting():
        now[0] += 3.0
    meter.add(LossSum({"loss": Term(torch.tensor(4.0))}))
    with meter.forward_watch:
        now[0] += 2.0
    meter.step({"targets": 4.0, "tokens": 8.0}, StepResult(1.0, True))
    now[0] += 5.0
    with meter.paused():  # evaluation is no part of a step's time
        now[0] += 100.0
    row = meter.flush()
    assert (row["slowest_rank"], row["slowest_to_median"]) == (1, pytest.approx(1.2))
    assert row["step_time_s"] == 10.0
    assert row["data_wait_share"] == pytest.approx(0.4)
    assert row["loss"] == 2.0
    with meter.waiting():
        pass
    meter.add(LossSum({"loss": Term(torch.tensor(4.0))}))
    meter.step({"targets": 4.0, "tokens": 8.0}, StepResult(1.0, True))
    with meter.forward_watch:
        now[0] += 10.0
    assert meter.flush()["data_wait_share"] == pytest.approx(0.25)  # cleared since the last report

import math

import pytest
import torch

from trainer.config import Optim, Schedule
from trainer.engine.optim import build_optimizer, learning_rate_at


def test_linear_rises_and_falls():
    schedule = Schedule(name="linear", warmup_steps=4)
    rates = [learning_rate_at(step, 1.0, schedule, 12) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.5) and rates[12] == 0.0


def test_cosine_ends_at_its_floor():
    schedule = Schedule(name="cosine", warmup_steps=0, min_ratio=0.1)
    assert learning_rate_at(0, 2.0, schedule, 100) == 2.0
    assert learning_rate_at(50, 2.0, schedule, 100) == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert learning_rate_at(100, 2.0, schedule, 100) == pytest.approx(0.2)
    assert learning_rate_at(25, 2.0, schedule, 100) == pytest.approx(2 * (0.1 + 0.45 * (1 + math.cos(math.pi / 4))))


def test_warmup_stable_decay_is_flat_between():
    schedule = Schedule(name="warmup_stable_decay", warmup_steps=2, decay_steps=4)
    rates = [learning_rate_at(step, 1.0, schedule, 12) for step in range(12)]
    assert rates[2:9] == [1.0] * 7
    assert rates[9:] == pytest.approx([0.75, 0.5, 0.25])


def test_constant_stays():
    assert learning_rate_at(10**6, 3e-4, Schedule(name="constant"), 10) == 3e-4


@pytest.mark.parametrize("backend", ["fused", "foreach", "auto"])
def test_updates_are_those_of_a_float64_adamw(backend):
    torch.manual_seed(0)
    optim = Optim(backend=backend, learning_rate=0.01, weight_decay=0.1)
    parameter = torch.nn.Parameter(torch.randn(50))
    weights, first, second = parameter.detach().double(), torch.zeros(50).double(), torch.zeros(50).double()
    said = []
    optimizer = build_optimizer(optim, [{"params": [parameter], "weight_decay": 0.1}], said.append)
    for step in range(1, 30):
        gradient = torch.randn(50)
        parameter.grad = gradient.clone()
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.98 * second + 0.02 * gradient.double() ** 2
        update = (first / (1 - 0.9**step)) / ((second / (1 - 0.98**step)).sqrt() + 1e-8)
        weights = weights * (1 - 0.01 * 0.1) - 0.01 * update
    torch.testing.assert_close(parameter.detach().double(), weights, rtol=1e-5, atol=1e-6)
    assert bool(said) == (backend == "auto")

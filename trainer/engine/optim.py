"""Optimizers and learning-rate schedules. A schedule is a pure function of the step, so it has no state to save;
which parameters are decayed is `models`' business."""

import math
from collections.abc import Callable
from typing import Any

import torch

from trainer.config import Optim, Schedule


def build_optimizer(optim: Optim, groups: list[dict[str, Any]], say: Callable[[str], None]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) over parameter groups that carry their weight decay."""
    backend = optim.backend
    if backend == "auto":
        backend = "fused"
        say("optimizer backend auto: torch's fused AdamW (one kernel for all tensors, on CPU and GPU)")
    return torch.optim.AdamW(
        groups,
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        fused=backend == "fused",
        foreach=backend == "foreach",
    )


def learning_rate_at(step: int, peak: float, schedule: Schedule, max_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0; warm-up rises linearly from peak / warmup_steps."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    if schedule.name == "warmup_stable_decay":
        assert schedule.decay_steps is not None
        start, length = max_steps - schedule.decay_steps, schedule.decay_steps
    else:
        start, length = schedule.warmup_steps, max_steps - schedule.warmup_steps
    done = min(1.0, max(0, step - start) / max(1, length))
    falling = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1.0 - done
    return peak * (schedule.min_ratio + (1.0 - schedule.min_ratio) * falling)

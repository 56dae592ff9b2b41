"""What the engine asks of a strategy: how one model and its optimizer are spread over ranks, stepped and taken apart.
`replicated`, `fsdp2` and `zero_strategy` each answer it; what a step means for the run is the loop's business."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.engine.fragments import Fragment

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepResult:
    """What became of an optimizer step; the same on all ranks."""

    grad_norm: float  # before clipping; not finite where gradients were not
    applied: bool  # False: gradients were not finite, and nothing was changed


class Strategy(Protocol):
    """One model in training, spread over the ranks in one way."""

    model: nn.Module  # what objectives call
    module: nn.Module  # the same without what a strategy wraps around it, for evaluation

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Learning rates are set in its param_groups."""
        ...

    def prepare(self, model: nn.Module, build: BuildOptimizer) -> None:
        """Take the model (float32, on the host, equal on all ranks but as in `Engine.is_given_weights`), and make its
        optimizer."""
        ...

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The precision in which forward passes run."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`, summed over ranks; `last`: no further micro-batch comes before `step`."""
        ...

    def step(self) -> StepResult:
        """Clip and update, or leave all as it is where gradients are not finite; then clear the gradients."""
        ...

    def loss_scale(self) -> float | None:
        """fp16: the factor that keeps small gradients from vanishing; None in other precisions."""
        ...

    def fragments(self) -> list[Fragment]:
        """The pieces of parameters and optimizer state that this rank is to save, and that it must be given back."""
        ...

    def state_keys(self) -> list[str]:
        """Names of the optimizer's elementwise states, such as exp_avg; the states are made if they are not there."""
        ...

    def restored(self, updates: int, scaler: Mapping[str, Any]) -> None:
        """After the fragments were given back: bring everything that follows from them up to date.

        updates: applied steps so far, from which Adam corrects its bias; scaler: what `scaler_state` gave.
        """
        ...

    def scaler_state(self) -> dict[str, Any]:
        """fp16: the state of the loss scaling, as JSON; else empty."""
        ...


def make_states(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer make its states, which it does at its first step: take one that moves nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set the number of updates that an optimizer believes it has made, wherever it keeps it."""
    for holder in (*optimizer.state.values(), *optimizer.param_groups):
        step = holder.get("step")
        if isinstance(step, Tensor):
            holder["step"] = torch.full_like(step, updates)
        elif step is not None:
            holder["step"] = updates


def elementwise_states(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the states that have one number for each element of a parameter."""
    return sorted(
        {
            key
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim
        }
    )

"""Training with the whole model on every rank: one process, or DistributedDataParallel through Accelerate.
Each rank saves its share of the parameters, and reads all of them."""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from trainer.engine.fragments import WEIGHT, Fragment, of_views
from trainer.engine.strategy import BuildOptimizer, StepResult, elementwise_states, make_states, set_updates


class Replicated:
    """See `strategy.Strategy`."""

    model: nn.Module
    module: nn.Module
    optimizer: AcceleratedOptimizer

    def __init__(self, accelerator: Accelerator, max_grad_norm: float | None) -> None:
        self._accelerator = accelerator
        self._limit = math.inf if max_grad_norm is None else max_grad_norm

    def prepare(self, model: nn.Module, build: BuildOptimizer) -> None:
        self.module = model
        model.to(self._accelerator.device)
        self.model, self.optimizer = self._accelerator.prepare(model, build(model))
        self._parameters = list(self.model.parameters())

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return self._accelerator.autocast()

    def backward(self, loss: Tensor, last: bool) -> None:
        world, scaler = self._accelerator.num_processes, self._accelerator.scaler
        total = loss * world if world > 1 else loss  # DDP averages over ranks, and a sum is wanted
        with contextlib.nullcontext() if last else self._accelerator.no_sync(self.model):
            (scaler.scale(total) if scaler is not None else total).backward()

    def step(self) -> StepResult:
        scaled = self._accelerator.scaler is not None
        self._accelerator.unscale_gradients()
        # Not Accelerator.clip_grad_norm_ and not its optimizer's step: the one looks for kinds of tensors that are not
        # here, the other searches sys.path for a package twice a step.
        grad_norm = float(nn.utils.clip_grad_norm_(self._parameters, self._limit))
        applied = math.isfinite(grad_norm)
        if scaled:  # the scaler skips by itself, and learns from it
            self.optimizer.step()
        elif applied:
            self.optimizer.optimizer.step()
        self.optimizer.optimizer.zero_grad()
        return StepResult(grad_norm, applied)

    def loss_scale(self) -> float | None:
        return self._accelerator.scaler.get_scale() if self._accelerator.scaler is not None else None

    def fragments(self) -> list[Fragment]:
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        return [
            of_views(name, parameter.shape, 0, parameter.numel(), self._views(parameter), number % world == rank)
            for number, (name, parameter) in enumerate(self.module.named_parameters())
        ]

    def _views(self, parameter: nn.Parameter) -> Callable[[str], Tensor]:
        state = self.optimizer.state
        return lambda key: (parameter.data if key == WEIGHT else state[parameter][key]).view(-1)

    def state_keys(self) -> list[str]:
        if not self.optimizer.state:
            make_states(self.optimizer.optimizer)
        return elementwise_states(self.optimizer.optimizer)

    def restored(self, updates: int, scaler: Mapping[str, Any]) -> None:
        set_updates(self.optimizer.optimizer, updates)
        if self._accelerator.scaler is not None and scaler:
            self._accelerator.scaler.load_state_dict(dict(scaler))

    def scaler_state(self) -> dict[str, Any]:
        return self._accelerator.scaler.state_dict() if self._accelerator.scaler is not None else {}

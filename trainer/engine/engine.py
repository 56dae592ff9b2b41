"""One face over Accelerate: whatever the launcher and the number of ranks, the loop only sees these verbs.
It knows nothing of objectives, data, or when to save."""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from trainer.config import Training
from trainer.errors import UserError

_WEIGHTS, _OPTIMIZER = "model.safetensors", "optimizer.pt"


class Engine:
    """Ranks, device, precision, gradients and optimizer of one training run."""

    model: nn.Module  # what objectives call: the model, wrapped as the launcher needs it
    optimizer: torch.optim.Optimizer

    def __init__(self, training: Training) -> None:
        self._training = training
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        precision = "no" if training.precision == "fp32" else training.precision
        if asked not in ("no", precision):
            raise UserError(
                f"the launcher was told mixed_precision {asked}, the recipe says precision: {training.precision}",
                "one owner of the precision, the recipe",
                "leave mixed_precision out of the launch, or change the recipe",
            )
        on_cpu = not torch.cuda.is_available()
        AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
        # Without the handler Accelerate takes CPU ranks for one process (seen with 1.15).
        group = [InitProcessGroupKwargs(backend="gloo")] if on_cpu and "RANK" in os.environ else []
        wrap = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        self._accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[wrap, *group])
        # Counts and votes are host numbers: on their own group they never make a GPU wait.
        self._host_group: Any = torch.distributed.new_group(backend="gloo") if self.world > 1 else None

    @property
    def rank(self) -> int:
        return self._accelerator.process_index

    @property
    def world(self) -> int:
        return self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self._accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    @property
    def unwrapped(self) -> nn.Module:
        """The model without what the launcher's strategy put around it."""
        return self._prepared

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Move the model to the device and wrap it; from now on `self.model` is the one to call."""
        self._prepared = model
        self.model, self.optimizer = self._accelerator.prepare(model, optimizer)

    def begin_step(self, step: int, learning_rate: float, seed: int) -> None:
        """Set what an optimizer step depends on: the learning rate, and dropout's randomness by (seed, step, rank)."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        mixed = np.random.SeedSequence([seed, 0xD809, step, self.rank]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(mixed >> np.uint64(1)))
        self.model.train()

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The precision in which forward passes run."""
        return self._accelerator.autocast()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`, already divided by the counts of all ranks; `last`: exchange them now.

        The strategies average over ranks; the loss is a share of a global sum, so the average is multiplied back.
        """
        synchronise = contextlib.nullcontext() if last else self._accelerator.no_sync(self.model)
        with synchronise:
            self._accelerator.backward(loss * self.world)

    def step(self) -> Tensor:
        """Clip, update, clear the gradients. Returns the gradients' norm before clipping, a scalar on the device."""
        limit = self._training.max_grad_norm or float("inf")
        norm = self._accelerator.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert norm is not None
        return norm

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all ranks, of numbers on the host."""
        if self._host_group is None:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self._host_group)
        return total.tolist()

    def agree(self, vote: bool) -> bool:
        """Whether any rank votes yes; every rank gets the same answer."""
        return self.sum([float(vote)])[0] > 0

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._host_group is None:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self._host_group)
        return box[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        self.sum([0.0])

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state into `folder` (rank 0; the others hold the same)."""
        if self.is_main:
            save_model(self.unwrapped, str(folder / _WEIGHTS))
            torch.save(self.optimizer.state_dict(), folder / _OPTIMIZER)

    def load(self, folder: Path) -> None:
        """Take weights and optimizer state from a folder that `save` wrote."""
        load_model(self.unwrapped, folder / _WEIGHTS, device=str(self.device))
        state = torch.load(folder / _OPTIMIZER, map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state)

    def peak_memory_gib(self) -> float | None:
        """Most memory the device has held for tensors; None on CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None

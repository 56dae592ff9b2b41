"""Training with every parameter sharded over all ranks by PyTorch's own fully_shard (FSDP2).
Blocks are gathered one after another, in the order in which the model runs them; each rank saves what it holds."""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trainer.engine.fragments import WEIGHT, Fragment, of_views
from trainer.engine.strategy import BuildOptimizer, StepResult, elementwise_states, make_states, set_updates
from trainer.heads import head_of
from trainer.models import LanguageModel, transformer_layers


class FullyShardedDataParallel:
    """See `strategy.Strategy`. Parameters, gradients and optimizer state are float32 DTensors."""

    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, device: torch.device, world: int, precision: str, max_grad_norm: float | None) -> None:
        self._device, self._world = device, world
        self._limit = math.inf if max_grad_norm is None else max_grad_norm
        # Gradients are summed over ranks in float32 whatever the compute dtype is.
        compute = torch.bfloat16 if precision == "bf16" else None
        self._policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, output_dtype=None)

    def prepare(self, model: nn.Module, build: BuildOptimizer) -> None:
        mesh = init_device_mesh(self._device.type, (self._world,))
        for part in (*transformer_layers(model), model):  # one after another, so that no rank needs room for all
            _take_from_rank_0(part, self._device)
            fully_shard(part, mesh=mesh, mp_policy=self._policy)
        self.model = self.module = model
        self.optimizer = build(model)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # the policy casts what each block gets

    def backward(self, loss: Tensor, last: bool) -> None:
        # Every micro-batch is reduced at once: waiting for the last would keep a whole float32 gradient on each rank.
        (loss * self._world).backward()  # reduce-scatter averages over ranks, and a sum is wanted

    def step(self) -> StepResult:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._limit)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        applied = math.isfinite(grad_norm)
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm, applied)

    def loss_scale(self) -> float | None:
        return None

    def fragments(self) -> list[Fragment]:
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # after an evaluation the root is still whole
        pieces = []
        for name, parameter in self.module.named_parameters():
            assert isinstance(parameter, DTensor)
            rows = -(-parameter.shape[0] // self._world)  # fully_shard cuts the first dimension as torch.chunk does
            start = parameter.device_mesh.get_local_rank() * rows * math.prod(parameter.shape[1:])
            if numel := parameter.to_local().numel():
                pieces.append(of_views(name, parameter.shape, start, numel, self._views(parameter)))
        return pieces

    def _views(self, parameter: DTensor) -> Callable[[str], Tensor]:
        def views(key: str) -> Tensor:
            value = parameter if key == WEIGHT else self.optimizer.state[parameter][key]
            assert isinstance(value, DTensor)
            return value.to_local().detach().view(-1)

        return views

    def state_keys(self) -> list[str]:
        if not self.optimizer.state:
            make_states(self.optimizer)
        return elementwise_states(self.optimizer)

    def restored(self, updates: int, scaler: Mapping[str, Any]) -> None:
        set_updates(self.optimizer, updates)

    def scaler_state(self) -> dict[str, Any]:
        return {}


def shard_frozen(model: LanguageModel, device: torch.device, world: int, dtype: torch.dtype) -> None:
    """Cut the transformer blocks of a model that is never trained over the ranks; the weights are rank 0's, in `dtype`.

    What is outside of them stays whole: an objective calls the head by itself, past the hooks that gather.
    """
    mesh = init_device_mesh(device.type, (world,))
    blocks = list(transformer_layers(model))
    for block in blocks:
        _take_from_rank_0(block, device, dtype)
        fully_shard(block, mesh=mesh)
    _take_from_rank_0(model, device, dtype)
    roots: list[Any] = blocks
    if head_of(model.model) is not None:  # a root has the blocks fetched ahead
        whole = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
        roots = [fully_shard(model.model.base_model, mesh=mesh, ignored_params=whole)]
    # Else the whole model is called, and transformers knows a class that fully_shard has changed by its old name only.
    for root in roots:
        if hasattr(root, "reset_iter_state"):  # torch 2.13
            root.register_forward_hook(_forget_order)


def _forget_order(root: Any, *_: Any) -> None:
    """FSDP2 notes in which order modules ran until a backward pass is over, which a frozen model never has."""
    root.reset_iter_state()


def share_held(model: nn.Module) -> float:
    """Of all weights, what part this rank holds."""
    weights = list(model.parameters())
    held = sum((weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in weights)
    return held / sum(weight.numel() for weight in weights)


def _take_from_rank_0(part: nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Whole parameters, in `dtype`, and buffers of a part, on the device."""
    whole = [parameter for parameter in part.parameters() if not isinstance(parameter, DTensor)]
    for tensor in (*whole, *part.buffers()):
        tensor.data = tensor.data.to(device, dtype if isinstance(tensor, nn.Parameter) else None)
        dist.broadcast(tensor.data, 0)

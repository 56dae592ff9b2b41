"""Training under DeepSpeed's ZeRO through Accelerate: optimizer state, gradients or parameters cut over the ranks.
Here is what DeepSpeed's engine wants done when, and where its shards lie; its configuration is made by `zero`.

Stages 1 and 2 keep, for each parameter group, one flat float32 shard a rank, in which parameters lie one after
another. Stage 3 cuts each parameter by itself and keeps its pieces in flat float32 sub-groups.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.engine.fragments import WEIGHT, Fragment, of_views
from trainer.engine.lamb import Lamb, Segments
from trainer.engine.strategy import BuildOptimizer, StepResult, elementwise_states, make_states, set_updates
from trainer.engine.zero import ZeroConfig

# What DeepSpeed's dynamic loss scaler goes by (deepspeed/runtime/fp16/loss_scaler.py).
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class _Place:
    """A part of a parameter in this rank's flat shard of its group."""

    group: int
    number: int  # of the parameter in its group, the same on all ranks
    parameter: nn.Parameter
    flat: Tensor
    start: int  # in the parameter
    at: int  # in the shard
    numel: int


class Zero:
    """See `strategy.Strategy`."""

    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, accelerator: Accelerator, max_grad_norm: float | None) -> None:
        self._accelerator = accelerator
        self._limit = math.inf if max_grad_norm is None else max_grad_norm

    def configure(self, zero: ZeroConfig) -> None:
        """Take the resolved configuration; to be called before `prepare`, and again when more of it is known."""
        self._zero = zero
        plugin: Any = self._accelerator.state.deepspeed_plugin
        plugin.deepspeed_config = zero.config

    def prepare(self, model: nn.Module, build: BuildOptimizer) -> None:
        self.module = model
        if self._zero.cuts_weights:
            optimizer = build(model)  # before the cut, after which a parameter shows no shape
            self._cut(model)
        else:
            model.to(self._accelerator.device)
            optimizer = build(model)
        self.model, _ = self._accelerator.prepare(model, optimizer)
        self._engine: Any = self.model
        self._wrapper: Any = self._engine.optimizer
        if self._zero.stage:
            # A gradient that is not finite discards the step in every precision, not in fp16 alone.
            self._wrapper.check_grad_overflow = True
            self.optimizer = self._wrapper.optimizer
        else:
            self.optimizer = self._wrapper
        if isinstance(self.optimizer, Lamb) and self._zero.stage:
            self.optimizer.shard(self._segments(), self._sum)

    def _cut(self, model: nn.Module) -> None:
        """Stage 3: each parameter comes to the device from rank 0, and is cut there, before the next one does."""
        from deepspeed import zero  # slow to import

        config, device = self._zero.config, self._accelerator.device
        halves = (("bf16", torch.bfloat16), ("fp16", torch.float16))
        dtype = next((half for name, half in halves if config[name]["enabled"]), torch.float32)

        def on_device() -> Iterator[nn.Parameter]:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(device, dtype)
                yield parameter

        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
            torch.distributed.broadcast(buffer.data, 0)
        zero.Init(config_dict_or_path=config, dtype=dtype)._convert_to_zero_parameters(on_device())

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """DeepSpeed casts in its own forward; evaluation goes past it, and would be in float32."""
        half = self._zero.autocasts
        if half is None:
            return contextlib.nullcontext()
        return torch.autocast(self._accelerator.device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[half])

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # The loss is divided by the counts of the whole step already; DeepSpeed averages over ranks.
        self._engine.backward(loss * self._accelerator.num_processes, scale_wrt_gas=False)

    def step(self) -> StepResult:
        if not self._zero.stage:
            return self._step_whole()
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        grad_norm = math.inf if norm is None else float(norm)
        return StepResult(grad_norm, not self._wrapper.overflow)

    def _step_whole(self) -> StepResult:
        """Stage 0: gradients are whole and summed; DeepSpeed itself would not look at them."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        grad_norm = float(nn.utils.get_total_norm(gradients)) / (self.loss_scale() or 1.0)
        if math.isfinite(grad_norm) or self._whole_scaler is not None:  # a scaler skips by itself, and learns from it
            self._engine.step()
        else:
            self._engine.zero_grad()
        return StepResult(grad_norm, math.isfinite(grad_norm))

    def loss_scale(self) -> float | None:
        if self._whole_scaler is not None:
            return self._whole_scaler.get_scale()
        return float(self._wrapper.loss_scale) if self._engine.fp16_enabled() else None

    @property
    def _whole_scaler(self) -> torch.amp.GradScaler | None:  # pyright: ignore[reportPrivateImportUsage]
        """fp16 at stage 0: torch's loss scaler, which DeepSpeed then has beside its optimizer."""
        return self._engine.torch_autocast_z0_gradscaler

    def fragments(self) -> list[Fragment]:
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        places = {id(place.parameter): place for place in self._places()} if self._zero.stage in (1, 2) else {}
        pieces = []
        for number, (name, parameter) in enumerate(self.module.named_parameters()):
            if self._zero.stage == 3:
                pieces += self._piece_of_parameter(name, parameter)
            elif self._zero.stage:
                pieces += self._piece_in_group(name, parameter, places)
            else:
                views = self._views(parameter, 0, parameter.numel())
                pieces.append(of_views(name, parameter.shape, 0, parameter.numel(), views, number % world == rank))
        return pieces

    def _piece_in_group(self, name: str, parameter: nn.Parameter, places: dict[int, _Place]) -> Iterator[Fragment]:
        if place := places.get(id(parameter)):
            views = self._views(place.flat, place.at, place.numel)
            yield of_views(name, parameter.shape, place.start, place.numel, views)

    def _places(self) -> Iterator[_Place]:
        """Stages 1 and 2: which part of which parameter this rank holds, and where.

        DeepSpeed's own links (_hp_mapping, 0.19.8) point to other parameters where round_robin_gradients has changed
        the order within a group, so that a checkpoint made by them would be a shuffled model.
        """
        wrapper, rank = self._wrapper, self._accelerator.process_index
        for group, parameters in enumerate(wrapper.round_robin_bit16_groups):
            flat = self.optimizer.param_groups[group]["params"][0]
            first, size = rank * flat.numel(), flat.numel()
            offsets = wrapper.round_robin_bit16_offsets[group]
            for number, (parameter, offset) in enumerate(zip(parameters, offsets, strict=True)):
                begin, end = max(offset, first), min(offset + parameter.numel(), first + size)
                if begin < end:
                    yield _Place(group, number, parameter, flat, begin - offset, begin - first, end - begin)

    def _piece_of_parameter(self, name: str, parameter: Any) -> Iterator[Fragment]:
        size = parameter.ds_tensor.ds_numel  # the same on all ranks
        start, numel = self._accelerator.process_index * size, self._real_numel(parameter)

        def read(key: str) -> Tensor:
            return self._wrapper.get_local_fp32_param(parameter, None if key == WEIGHT else key)[:numel].detach()

        def write(key: str, value: Tensor) -> None:
            padded = torch.zeros(size, dtype=torch.float32, device=self._accelerator.device)
            padded[:numel] = value
            self._wrapper.set_local_hp_param(padded, parameter, None if key == WEIGHT else key)

        if numel:
            yield Fragment(name, tuple(parameter.ds_shape), start, numel, read, write)

    def _views(self, flat: Tensor, start: int, numel: int) -> Callable[[str], Tensor]:
        state = self.optimizer.state
        return lambda key: (flat.data if key == WEIGHT else state[flat][key]).view(-1)[start : start + numel]

    def state_keys(self) -> list[str]:
        if not self.optimizer.state:
            self._make_states()
        return elementwise_states(self.optimizer)

    def _make_states(self) -> None:
        if self._zero.stage < 3:
            gradients = [[p.grad for p in group["params"]] for group in self.optimizer.param_groups]
            make_states(self.optimizer)
            for group, kept in zip(self.optimizer.param_groups, gradients, strict=True):
                for parameter, gradient in zip(group["params"], kept, strict=True):
                    parameter.grad = gradient  # under offload DeepSpeed goes on using its buffers
            return
        for number, flat in enumerate(self._wrapper.fp32_partitioned_groups_flat):
            self._make_states_of(number, flat)

    def _make_states_of(self, number: int, flat: Tensor) -> None:
        """Stage 3: DeepSpeed steps one sub-group after another, and may keep them on a disk in between."""
        swapped = self._wrapper._swappable_optimizer_subgroup(number)
        if swapped:
            self._wrapper._optimizer_states_and_gradient_swap_in(number)
        kept, flat.grad = flat.grad, torch.zeros_like(flat)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self._wrapper._optimizer_step(number)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        flat.grad = kept
        if swapped:
            self._wrapper._optimizer_states_and_gradient_swap_out(number)

    def restored(self, updates: int, scaler: Mapping[str, Any]) -> None:
        set_updates(self.optimizer, updates)
        if self._whole_scaler is not None:
            if "scale" in scaler:  # else of a strategy whose scaler is another
                self._whole_scaler.load_state_dict(dict(scaler))
        elif self._engine.fp16_enabled():
            for name, value in scaler.items():
                setattr(self._wrapper.loss_scaler, name, value)
        if self._zero.stage == 3:
            self._refresh_parameters()
        elif self._zero.stage:
            self._wrapper.update_lp_params()

    def _refresh_parameters(self) -> None:
        """Stage 3: what the model computes with follows from the float32 shards."""
        wrapper = self._wrapper
        for number in range(len(wrapper.fp32_partitioned_groups_flat)):
            swapped = wrapper._swappable_optimizer_subgroup(number)
            if swapped:
                wrapper._optimizer_states_and_gradient_swap_in(number)
            wrapper._reassign_or_swap_out_partitioned_parameters(number)
            if swapped:
                wrapper._optimizer_states_and_gradient_swap_out(number)
        kept_whole = wrapper.persistent_parameters  # on every rank, so they have to be gathered anew
        if kept_whole:
            kept_whole[0].partition(kept_whole)
        wrapper.invalidate_secondary_tensor()  # ZeRO++'s copies within a node, of what the parameters were
        if kept_whole:
            kept_whole[0].all_gather(kept_whole)

    def scaler_state(self) -> dict[str, Any]:
        if self._whole_scaler is not None:
            return self._whole_scaler.state_dict()
        if not self._engine.fp16_enabled():
            return {}
        return {name: getattr(self._wrapper.loss_scaler, name) for name in _SCALER}

    def _segments(self) -> Callable[[Tensor], Segments | None]:
        """Where whole parameters lie in a flat shard, for an optimizer that treats each by itself."""
        table = {}
        if self._zero.stage == 3:
            for number, flat in enumerate(self._wrapper.fp32_partitioned_groups_flat):
                table[id(flat)] = self._segments_of_subgroup(self._wrapper.fp16_groups[number])
        else:
            for number, group in enumerate(self._wrapper.round_robin_bit16_groups):
                flat = self.optimizer.param_groups[number]["params"][0]
                pieces = [(p.number, p.at, p.at + p.numel) for p in self._places() if p.group == number]
                table[id(flat)] = Segments(tuple(pieces), len(group))
        return lambda flat: table.get(id(flat))

    def _segments_of_subgroup(self, parameters: list[Any]) -> Segments:
        pieces = []
        for number, parameter in enumerate(parameters):
            _, offset, _ = self._wrapper.grad_position[self._wrapper.get_param_id(parameter)]
            pieces.append((number, offset, offset + self._real_numel(parameter)))
        return Segments(tuple(pieces), len(parameters))

    def _real_numel(self, parameter: Any) -> int:
        """Stage 3: elements of a parameter on this rank, without what the last ranks' pieces are padded with."""
        size = parameter.ds_tensor.ds_numel
        return max(0, min(size, parameter.ds_numel - self._accelerator.process_index * size))

    def _sum(self, table: Tensor) -> None:
        torch.distributed.all_reduce(table)

"""Which implementation of an optimizer a run gets, and learning-rate schedules. A schedule is a pure function of the
step, so it has no state to save; which parameters are decayed is `models`' business, LAMB itself is in `lamb`."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from typing import Any

import torch

from trainer.config import Optim, Schedule
from trainer.engine.lamb import Lamb
from trainer.environment import APEX_BUILD, apex_kind
from trainer.errors import UserError

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class _Place:
    """Where the optimizer's tensors will be: on which device, and whether they are pieces of the model's."""

    device_type: str
    offload: bool
    sharded: bool

    @property
    def on_gpu(self) -> bool:
        return self.device_type == "cuda" and not self.offload


def build_optimizer(
    optim: Optim, groups: Groups, say: Callable[[str], None], *, device_type: str, offload: bool, sharded: bool
) -> torch.optim.Optimizer:
    """The recipe's optimizer over parameter groups that carry their weight decay.

    `device_type`: where the model is. `offload`: the optimizer's tensors stay on the CPU. `sharded`: it will be given
    pieces of tensors (ZeRO-1 and up, FSDP2). UserError where the backend is missing or would compute something else.
    """
    place = _Place(device_type, offload, sharded)
    backend = optim.backend
    if backend == "auto":
        backend, why = _fastest(optim.name, place)
        say(f"optimizer backend auto: {backend} ({why})")
    build = {"torch": _torch, "torch_foreach": _torch_foreach, "apex": _apex, "deepspeed": _deepspeed}[backend]
    optimizer = build(optim, groups, place)
    if (optim.name, backend) == ("lamb", "deepspeed"):
        say(
            "DeepSpeed's FusedLamb is a variant: it takes the ratio of norms before bias correction, holds it between "
            "0.01 and 10, and applies it to parameters without weight decay too"
        )  # csrc/lamb/fused_lamb_cuda_kernel.cu
    return optimizer


def _fastest(name: str, place: _Place) -> tuple[str, str]:
    """What `auto` takes, and why."""
    if name == "lion":
        return "deepspeed", "only DeepSpeed has Lion"
    if name == "adamw" and place.offload:
        return "deepspeed", "its CPUAdam, made for offloaded state"
    if place.on_gpu and not place.sharded and apex_kind() == "nvidia":
        return "apex", "NVIDIA's fused kernels, for whole tensors on a GPU"
    if name == "lamb":
        return "torch", "lmworks' LAMB, whose norms are those of whole tensors wherever these lie"
    return "torch", "fused AdamW: one kernel for all tensors, on CPU and GPU"


def _torch(optim: Optim, groups: Groups, place: _Place) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) or LAMB."""
    if optim.name == "lion":
        raise _has_no(optim, "DeepSpeed has one: deepspeed")
    if optim.name == "lamb":
        return Lamb(groups, **_adam_settings(optim))
    return torch.optim.AdamW(groups, fused=True, **_adam_settings(optim))


def _torch_foreach(optim: Optim, groups: Groups, place: _Place) -> torch.optim.Optimizer:
    if optim.name != "adamw":
        raise _has_no(optim, "auto")
    return torch.optim.AdamW(groups, foreach=True, **_adam_settings(optim))


def _apex(optim: Optim, groups: Groups, place: _Place) -> torch.optim.Optimizer:
    """NVIDIA Apex's FusedAdam or FusedLAMB, the latter with its own clipping off, as the engine clips."""
    if optim.name == "lion":
        raise _has_no(optim, "DeepSpeed has one: deepspeed")
    if optim.name == "lamb" and place.sharded:
        raise _lamb_on_shards("apex")
    if place.sharded:
        # FusedAdam of commit 6424da3 counts steps by group; ZeRO-3 calls `step` once for each part of a group.
        raise UserError(
            "optim.backend: apex with sharded tensors; its FusedAdam counts a step too often where ZeRO-3 steps a "
            "group in parts, and it does not know DTensors",
            "an optimizer that counts steps by tensor",
            "set optim.backend to deepspeed under ZeRO (its FusedAdam has the same kernels), else to torch",
        )
    if not place.on_gpu:
        raise _gpu_only("apex", place)
    found = apex_kind()
    if found != "nvidia":
        raise UserError(
            {
                "absent": "optim.backend: apex, but apex is not installed",
                "other": "optim.backend: apex, but the installed apex is another project, as PyPI's is",
                "without kernels": "optim.backend: apex, but it was built without its CUDA kernels (amp_C)",
            }[found],
            "NVIDIA Apex with its CUDA kernels",
            ("pip uninstall apex; " if found == "other" else "") + APEX_BUILD,
        )
    optimizers = importlib.import_module("apex.optimizers")
    settings = _adam_settings(optim) | {"bias_correction": True, "adam_w_mode": True}
    if optim.name == "lamb":
        return optimizers.FusedLAMB(groups, max_grad_norm=math.inf, use_nvlamb=False, **settings)
    return optimizers.FusedAdam(groups, **settings)


def _deepspeed(optim: Optim, groups: Groups, place: _Place) -> torch.optim.Optimizer:
    """DeepSpeed's own ops, which it builds at their first use."""
    if optim.name == "lamb" and place.sharded:
        raise _lamb_on_shards("deepspeed")
    if optim.name == "lamb" and not place.on_gpu:
        raise _gpu_only("deepspeed", place)
    if util.find_spec("deepspeed") is None:
        raise UserError(
            f"optim.name: {optim.name} is to be DeepSpeed's, but DeepSpeed is not installed",
            "deepspeed",
            "pip install 'lmworks[deepspeed]'",
        )
    settings = _adam_settings(optim)
    if optim.name == "lion":
        del settings["eps"]
        return _built("lion", "DeepSpeedCPULion" if place.offload else "FusedLion", groups, settings)
    settings["bias_correction"] = True
    if optim.name == "lamb":
        return _built("lamb", "FusedLamb", groups, settings)
    if place.offload:
        return _built("adam", "DeepSpeedCPUAdam", groups, settings | {"adamw_mode": True})
    return _built("adam", "FusedAdam", groups, settings | {"adam_w_mode": True})


def _built(module: str, name: str, groups: Groups, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """An optimizer of deepspeed.ops, which compiles its op if it has to; UserError if that fails."""
    try:
        return getattr(importlib.import_module(f"deepspeed.ops.{module}"), name)(groups, **settings)
    except Exception as error:  # whatever the build raises: no compiler, no nvcc, another CUDA, no such op on CPUs
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"DeepSpeed's {name} cannot be built here: {reason}",
            "g++ and ninja, on a GPU nvcc of torch's CUDA version too (lmworks doctor shows them)",
            "install what is missing, or set optim.backend to torch",
        ) from error


def _adam_settings(optim: Optim) -> dict[str, Any]:
    return {"lr": optim.learning_rate, "betas": (optim.beta1, optim.beta2), "eps": optim.epsilon}


def _has_no(optim: Optim, instead: str) -> UserError:
    return UserError(
        f"optim.backend: {optim.backend} with optim.name: {optim.name}",
        f"a backend that has {optim.name}",
        f"set optim.backend to one that has it ({instead}) or leave it at auto",
    )


def _gpu_only(backend: str, place: _Place) -> UserError:
    where = "offloaded to the CPU" if place.offload else f"on the {place.device_type} device"
    return UserError(
        f"optim.backend: {backend}, but the optimizer's tensors are {where}",
        "an NVIDIA GPU: this optimizer has no other kernels",
        "leave optim.backend at auto",
    )


def _lamb_on_shards(backend: str) -> UserError:
    return UserError(
        f"optim.name: lamb with optim.backend: {backend} on sharded tensors; LAMB scales each tensor by its norm, and "
        "this implementation would take the norms of flat shards, which hold pieces of many tensors "
        "(deepspeedai/DeepSpeed issues 88 and 1217)",
        "norms of whole tensors, summed over the ranks",
        "leave optim.backend at auto: lmworks' own LAMB sums them",
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

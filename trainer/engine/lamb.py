"""LAMB over whole tensors, DTensors and the flat shards of ZeRO: the norms are always those of whole tensors.
How shards are cut and how ranks sum is told by the engine; clipping and the schedule are the engine's too.

Legend: T tensors as all ranks number them, P pieces of them that this rank holds; 2 for weights and updates.
"""
# pyright: reportPrivateImportUsage=false
# torch._foreach_* and torch._fused_adamw_ are what torch's own optimizers are made of; nothing public does the same.

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

# Updates take 4 bytes an element until they are applied, so not all tensors are updated at once. On CPUs the bound is
# what malloc keeps from one bundle to the next: page faults of fresh memory for a whole BERT-base took half of the
# step's CPU time (seen: 499 ms against 277). On a GPU, 256 MiB, so that launches do not show (assumed).
_BUNDLE_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}


@dataclass(frozen=True)
class Segments:
    """Where the tensors of a group lie in a flat shard: pieces (tensor index, start, stop) of it, for `count` tensors
    that all ranks number alike. What lies in no piece is padding and is never changed."""

    pieces: tuple[tuple[int, int, int], ...]
    count: int


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2019, arXiv:1904.00962, algorithm 2) as NVIDIA's Apex computes it (apex/optimizers/fused_lamb.py
    and csrc/multi_tensor_lamb.cu of commit 6424da3, with adam_w_mode, bias_correction and grad_averaging):

        m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,  both divided by 1 - beta^t for
        u = m / (sqrt(v) + eps) + decay w,  w = w - lr (|w| / |u|) u

    The ratio of norms is 1 where either is 0, and in groups without weight decay (Apex: use_nvlamb=False). State is
    named as AdamW's. Sharded by ZeRO, one flat tensor holds pieces of many parameters, so the norms of what `step` is
    given would be wrong (microsoft/DeepSpeed issues 88 and 490): see `shard`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._segments_of: Callable[[Tensor], Segments | None] | None = None
        self._reduce: Callable[[Tensor], None] | None = None
        self._cuts: dict[Tensor, _Cut | None] = {}

    def shard(self, segments_of: Callable[[Tensor], Segments | None], reduce: Callable[[Tensor], None]) -> None:
        """From now on the parameters are flat shards, cut as `segments_of` says (None: that one is a whole tensor).

        `reduce` sums a [2, count] tensor of squared norms in place over the ranks that share the shards. It is called
        once for each flat tensor of a group with weight decay, so every rank has to call `step` alike.
        """
        self._segments_of, self._reduce, self._cuts = segments_of, reduce, {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient. Nothing waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in self._bundles([param for param in group["params"] if param.grad is not None]):
                self._update(params, group)
        return loss

    def _bundles(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Tensors that are updated together: one flat shard, or some whole ones that lie on the same mesh alike."""
        together: dict[Any, list[Tensor]] = {}
        for param in params:
            if self._cut(param) is not None:
                yield [param]
            else:
                lies = (param.device_mesh, param.placements) if isinstance(param, DTensor) else None
                together.setdefault(lies, []).append(param)
        for alike in together.values():
            yield from _limited(alike)

    def _update(self, params: list[Tensor], group: Mapping[str, Any]) -> None:
        weights = [_local(param.detach()) for param in params]
        updates = self._updates(params, weights, group)
        decay, cut = group["weight_decay"], self._cut(params[0])
        if cut is not None:
            weights, updates = cut.pieces(weights[0]), cut.pieces(updates[0])
        ratios_P = self._ratios(params, cut, weights, updates) if decay else None
        if not weights:  # this rank has only padding of the flat tensor
            return
        if ratios_P is None:
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
        else:
            torch._foreach_addcmul_(weights, updates, ratios_P, value=-group["lr"])

    def _updates(self, params: list[Tensor], weights: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        """Advance the moments of `params`; returns their bias-corrected Adam directions plus decay times weights."""
        states = [self._state_of(param) for param in params]
        steps = list(torch._foreach_add([state["step"] for state in states], 1))
        for state, step in zip(states, steps, strict=True):
            state["step"] = step  # not in place: DeepSpeed's loading of universal checkpoints makes tensors share one
        exp_avgs, exp_avg_sqs = ([_local(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
        gradients = [_like(_local(param.grad), moment) for param, moment in zip(params, exp_avgs, strict=True)]
        # torch's fused Adam reads and writes everything once. Given the decay for weights and a learning rate of -1, it
        # adds the direction to it.
        decay = group["weight_decay"]
        updates = list(torch._foreach_mul(weights, decay)) if decay else [torch.zeros_like(one) for one in weights]
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            updates,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            lr=-1.0,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        return updates

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        """Its state, made at the first step; a loaded `step` is brought to the parameter's device."""
        assert param.dtype == torch.float32, "master weights are fp32"
        state = self.state[param]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)
        return state

    def _ratios(
        self, params: list[Tensor], cut: "_Cut | None", weights: list[Tensor], updates: list[Tensor]
    ) -> list[Tensor]:
        """|w| / |u| of the whole tensor for each piece."""
        squares_2P = squares_2T = _squared_norms([*weights, *updates], params[0].device).view(2, -1)
        if cut is not None:
            assert self._reduce is not None
            squares_2T = squares_2P.new_zeros(2, cut.count).index_add_(1, cut.tensors_P, squares_2P)
            self._reduce(squares_2T)
        elif isinstance(params[0], DTensor):
            _sum_over_mesh(squares_2T, params[0])
        norms_2T = squares_2T.sqrt()
        ratios_T = torch.where((norms_2T != 0).all(0), norms_2T[0] / norms_2T[1], 1.0)
        return list((ratios_T if cut is None else ratios_T[cut.tensors_P]).unbind())

    def _cut(self, param: Tensor) -> "_Cut | None":
        if self._segments_of is None:
            return None
        if param not in self._cuts:
            segments = self._segments_of(param)
            self._cuts[param] = None if segments is None else _Cut(segments, param)
        return self._cuts[param]


class _Cut:
    """The segments of one flat tensor, made ready once.

    A step then costs two calls of `split`, whose views are made in C++ (about half a microsecond a piece), one kernel
    for all norms on a GPU, and for each piece one kernel that updates it. An index of the tensor of every element would
    save these kernels but take 8 bytes an element, half as much as weights and moments do.
    """

    def __init__(self, segments: Segments, flat: Tensor) -> None:
        pieces = sorted(segments.pieces, key=itemgetter(1))
        self.count = segments.count
        self.tensors_P = torch.tensor([tensor for tensor, _, _ in pieces], dtype=torch.int64, device=flat.device)
        self._lengths: list[int] = []  # of pieces and of the gaps between them
        self._kept: list[int] = []  # which of these are pieces
        at = 0
        for _, start, stop in pieces:
            assert at <= start <= stop, "pieces of a flat tensor overlap"
            self._lengths += [start - at, stop - start]
            self._kept.append(len(self._lengths) - 1)
            at = stop
        self._lengths.append(flat.numel() - at)
        assert self._lengths[-1] >= 0, "pieces reach beyond the flat tensor"

    def pieces(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self._lengths)
        return [parts[index] for index in self._kept]


def _limited(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors with at most _BUNDLE_ELEMENTS on a rank, the same on all ranks; a larger tensor is one alone."""
    run, elements = [], 0
    for param in params:
        limit = _BUNDLE_ELEMENTS.get(param.device.type, _BUNDLE_ELEMENTS["cuda"])
        own = param.numel() // (param.device_mesh.size() if isinstance(param, DTensor) else 1)
        if run and elements + own > limit:
            yield run
            run, elements = [], 0
        run.append(param)
        elements += own
    if run:
        yield run


def _squared_norms(tensors: list[Tensor], device: torch.device) -> Tensor:
    """|x|^2 of each tensor, in one vector."""
    if not tensors:
        return torch.empty(0, device=device)
    if device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors)).square()
    # On CPUs torch 2.13 adds up a tensor in a few fp32 lanes: the norm of 23 million elements comes out 0.1 % short.
    # In parts of this many elements it is right to 1e-7, and as fast (seen).
    parts = [tensor.reshape(-1).split(2**15) for tensor in tensors]
    squares = torch.stack(torch._foreach_norm([part for own in parts for part in own])).square()
    return torch.stack([own.sum() for own in squares.split([len(own) for own in parts])])


def _local(tensor: Tensor | None) -> Tensor:
    """This rank's part of a DTensor, any other tensor as it is."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(gradient: Tensor, moment: Tensor) -> Tensor:
    """The gradient with the memory layout of its moments, as the fused kernel takes elements in memory's order."""
    if gradient.stride() == moment.stride():
        return gradient
    return torch.empty_like(moment).copy_(gradient)


def _sum_over_mesh(squares_2T: Tensor, param: DTensor) -> None:
    """Sum over the ranks that hold other parts of the tensors. One collective for all of them: the norm of a DTensor
    is right too, but takes a collective each."""
    for dimension, placement in enumerate(param.placements):
        if not placement.is_replicate():
            torch.distributed.all_reduce(squares_2T, group=param.device_mesh.get_group(dimension))

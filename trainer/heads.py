"""The head of a language model where there is a target, and sums over its logits: of all targets at once, or of a
part of them at a time, so that the logits of a large vocabulary never exist together.
Which sums make a loss is the objectives' business; who are the targets is the data code's.

Shapes: N target tokens, C of them in one part, D hidden size, V vocabulary.
"""

import contextlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trainer.errors import UserError

Sums = dict[str, Tensor]  # scalars by name, summed over targets or tokens
Score = Callable[[Tensor, slice], Sums]  # logits [C, V] of a part of the targets, and which part

# Logits of one part in float32. Large enough to keep a GPU's matrix units busy (at V = 131,072: 512 targets), small
# beside what a layer keeps for its backward. Assumed; tests/benchmarks/loss_memory.py measures what it costs.
_PART_BYTES = 2**28
# `auto` makes all logits at once while they take less than this share of the device's memory: three matrices of that
# size exist at the same time (tests/benchmarks/loss_memory.py, float32 on a CPU), so a fifth of the memory at the most.
# Parts run the head once more in the backward pass, which costs time that need not be spent before.
_WHOLE_SHARE = 1 / 16


class Head(NamedTuple):
    """hidden -> before -> linear -> logits, each of them token by token."""

    before: Callable[[Tensor], Tensor]
    linear: Callable[[Tensor], Tensor]

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """[C, V]."""
        return self.linear(self.before(hidden_CD))


def nothing(hidden: Tensor) -> Tensor:
    """What stands before the last linear layer of most causal models."""
    return hidden


_HEADS: dict[str, Callable[[Any], Head]] = {
    "bert": lambda model: Head(model.cls.predictions.transform, model.cls.predictions.decoder),
    "roberta": lambda model: Head(
        lambda hidden_CD: model.lm_head.layer_norm(F.gelu(model.lm_head.dense(hidden_CD))), model.lm_head.decoder
    ),
    "modernbert": lambda model: Head(model.head, model.decoder),
    "distilbert": lambda model: Head(
        lambda hidden_CD: model.vocab_layer_norm(model.activation(model.vocab_transform(hidden_CD))),
        model.vocab_projector,
    ),
}
# Causal models whose logits are lm_head(last hidden state) and nothing more; others scale or cap them.
_PLAIN = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi3", "gemma", "olmo2", "smollm3")


def head_of(model: PreTrainedModel) -> Head | None:
    """The head of an architecture that is known to have one that works token by token; None for the others."""
    architecture = model.config.model_type
    if architecture in _PLAIN:
        return Head(nothing, model.lm_head)
    return _HEADS[architecture](model) if architecture in _HEADS else None


@dataclass(frozen=True)
class CrossEntropy:
    """A score: summed -log p(target) in nats, and how many targets have the highest logit."""

    targets_N: Tensor

    def __call__(self, logits_CV: Tensor, part: slice) -> Sums:
        return _sums(logits_CV, self.targets_N[part])


def _sums(logits_CV: Tensor, targets_C: Tensor) -> Sums:
    return {"loss": cross_entropy(logits_CV, targets_C), "accuracy": hits(logits_CV, targets_C)}


@cache
def compiled_sums() -> Callable[[Tensor, Tensor], Sums]:
    """`CrossEntropy` by inductor. The head's matrix product stays outside: ZeRO-3 gathers its weights by hooks."""
    return torch.compile(_sums)


def cross_entropy(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Summed cross entropy in float32, scalar."""
    return F.cross_entropy(logits_CV.float(), targets_C, reduction="sum")


def hits(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """How many targets have the highest logit, scalar."""
    return (logits_CV.detach().argmax(dim=-1) == targets_C).sum().float()


class LossPlan(NamedTuple):
    """How the sums over the targets' logits are made.

    The number of parts is fixed for a run, whatever the number of targets in a batch: under ZeRO-3 each call of the
    head gathers its weights from all ranks, so that all must call it equally often.
    """

    parts: int = 1
    liger: bool = False
    compiled: bool = False
    """Cross entropy is compiled, but for distillation's."""


WHOLE = LossPlan()


def choose_loss_plan(
    wanted: str,
    model: PreTrainedModel,
    most_targets: int,
    distilling: bool,
    device: torch.device,
    say: Callable[[str], None],
) -> LossPlan:
    """The plan for `cross_entropy: wanted`, for micro-batches of up to `most_targets`; auto says what it took.

    UserError where the choice cannot be had: a head that is not known to work token by token, a missing package.
    """
    vocabulary = model.config.vocab_size
    parts = math.ceil(4 * most_targets * vocabulary / _PART_BYTES)
    if wanted == "auto":
        logits = most_targets * vocabulary * (2 if distilling else 1)  # the teacher's exist beside the student's
        whole_gib, limit_gib = 4 * logits / 2**30, _WHOLE_SHARE * memory_bytes(device) / 2**30
        wanted = "chunked" if whole_gib > limit_gib and head_of(model) is not None else "full"
        say(
            f"cross_entropy auto: {wanted} (a micro-batch has up to {whole_gib:.2g} GiB of float32 logits, "
            f"{limit_gib:.2g} GiB is what this device takes at once)"
        )
    if wanted == "full":
        return WHOLE
    if head_of(model) is None:
        raise UserError(
            f"cross_entropy {wanted}: nothing is known about the head of architecture {model.config.model_type!r}",
            f"one of {', '.join([*_HEADS, *_PLAIN])}",
            "set cross_entropy: full",
        )
    if wanted == "liger":
        _require_liger(device, distilling)
    return LossPlan(parts, wanted == "liger")


def memory_bytes(device: torch.device) -> int:
    """Memory of the device; of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def sums_over_targets(head: Head, hidden_ND: Tensor, score: Score, plan: LossPlan) -> Sums:
    """What `score` makes of the logits of all targets. Runs the head within the caller's forward pass.

    In parts: the logits of a part are forgotten after its sums and made again in the backward pass, but for the
    last part's, which the backward pass needs first. A part of no targets is run like the others: under DDP every
    parameter has to be in the graph.
    """
    training = torch.is_grad_enabled()
    if plan.liger and training and len(hidden_ND):
        assert isinstance(score, CrossEntropy), "liger knows no other loss"
        return _liger_sums(head, hidden_ND, score)
    ends = [len(hidden_ND) * part // plan.parts for part in range(plan.parts + 1)]
    pieces = [slice(start, end) for start, end in pairwise(ends)]
    # One split, not a slice for each part: the backward of a slice fills a whole [N, D] with zeros.
    hidden_CD = hidden_ND.split([piece.stop - piece.start for piece in pieces]) if plan.parts > 1 else (hidden_ND,)
    totals: Sums = {}
    for number, piece in enumerate(pieces):
        arguments = head, hidden_CD[number], score, piece, plan
        if training and number < plan.parts - 1:
            sums = checkpoint(_part, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            sums = _part(*arguments)
        totals = {name: totals[name] + value if totals else value for name, value in sums.items()}
    return totals


def _part(head: Head, hidden_CD: Tensor, score: Score, part: slice, plan: LossPlan) -> Sums:
    added_up = plan.parts > 1 and torch.is_grad_enabled()
    with _weight_cast_anew(hidden_CD.device.type) if added_up else contextlib.nullcontext():
        logits_CV = head.logits(hidden_CD)
    if plan.compiled and isinstance(score, CrossEntropy):
        return compiled_sums()(logits_CV, score.targets_N[part])
    return score(logits_CV, part)


def _weight_cast_anew(kind: str) -> torch.autocast:
    """Autocast, if it is on, without its cache: of the one copy that all parts would share, their gradients would be
    added up in 16 bits. (Where no autocast is, under FSDP2 and ZeRO's bf16 section, they are.)"""
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False)


def _require_liger(device: torch.device, distilling: bool) -> None:
    if distilling:
        raise UserError("cross_entropy liger: it has no loss for distillation", "one that has", "use chunked or auto")
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "cross_entropy liger: no package liger-kernel", "it", "pip install liger-kernel, or use chunked"
        )
    if device.type != "cuda":
        raise UserError(
            f"cross_entropy liger: its kernel does not run on {device.type}", "a GPU", "use chunked or auto"
        )


def _liger_sums(head: Head, hidden_ND: Tensor, score: CrossEntropy) -> Sums:
    """Cross entropy by Liger (arXiv:2410.10989), which makes the gradients in the forward pass, part by part."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

    linear: Any = head.linear
    if linear.weight.numel() == 0:
        raise UserError(
            "cross_entropy liger: the head's weight is spread over the ranks",
            "the whole weight, which ZeRO-3 gives a layer only in its own forward",
            "use chunked",
        )
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", return_predicted_tokens=True)
    output = loss(linear.weight, head.before(hidden_ND), score.targets_N, linear.bias)
    return {"loss": output.loss, "accuracy": (output.predicted_tokens == score.targets_N).sum().float()}

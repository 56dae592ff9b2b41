"""What an objective returns: sums over tokens, each with the count that it is to be divided by.
The division itself, by counts over all ranks and micro-batches, is done once by the loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from trainer.data.stream import Batch

Per = Literal["targets", "tokens"]


@dataclass(frozen=True)
class Term:
    """One weighted part of a loss, summed over targets or over all tokens that are not padding."""

    total: Tensor  # scalar, float32, with gradient
    weight: float = 1.0
    per: Per = "targets"


@dataclass(frozen=True)
class LossSum:
    """Terms to be minimised, and sums that are only reported (per target)."""

    terms: Mapping[str, Term]
    reported: Mapping[str, Tensor] = field(default_factory=dict)

    def divided(self, counts: Mapping[str, float]) -> Tensor:
        """The scalar to minimise: each term divided by its count over the whole step, weighted and added."""
        parts = [term.weight * term.total / counts[term.per] for term in self.terms.values()]
        return torch.stack(parts).sum()


class Objective(Protocol):
    """`(model, batch) -> LossSum`, the one thing that tells pretraining, distillation and fine-tuning apart."""

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum: ...

"""Cross entropy on target tokens, for masked and causal language models alike: they differ in their batches only.
Which tokens are targets is decided by the data code."""

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data.stream import Batch
from trainer.models import forward_batch
from trainer.objectives.loss import LossSum, Term


def language_model(model: nn.Module, batch: Batch) -> LossSum:
    """Sum over targets of -log p(target), in nats, with the number of targets hit by the most probable token."""
    logits_NV = forward_batch(model, batch).logits_NV
    return LossSum(
        {"loss": Term(cross_entropy(logits_NV, batch.targets))}, {"accuracy": hits(logits_NV, batch.targets)}
    )


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Summed cross entropy in float32, scalar."""
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def hits(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """How many targets have the highest logit, scalar."""
    return (logits_NV.detach().argmax(dim=-1) == targets_N).sum().float()

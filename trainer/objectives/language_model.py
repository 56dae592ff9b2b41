"""Cross entropy on target tokens, for masked and causal language models alike: they differ in their batches only.
Which tokens are targets is decided by the data code, how the sums are made by the model's head."""

from torch import nn

from trainer.data.stream import Batch
from trainer.heads import CrossEntropy
from trainer.objectives.loss import LossSum, Term


def language_model(model: nn.Module, batch: Batch) -> LossSum:
    """Sum over targets of -log p(target), in nats, with the number of targets hit by the most probable token."""
    sums = model(batch=batch, score=CrossEntropy(batch.targets))
    return LossSum({"loss": Term(sums["loss"])}, {"accuracy": sums["accuracy"]})

"""Knowledge distillation of language models: the student matches the teacher's distribution and hidden states.
The teacher is frozen and seen through the same batches; who builds the two models is the distill stage.

Shapes: N target tokens, V vocabulary, M tokens that are not padding, D hidden size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import DistillWeights
from trainer.data.stream import Batch
from trainer.models import LanguageModel, forward_batch
from trainer.objectives.language_model import cross_entropy, hits
from trainer.objectives.loss import LossSum, Term


@dataclass(frozen=True)
class Distillation:
    """DistilBERT's triple loss (Sanh et al. 2019, arXiv:1910.01108).

    soft: temperature^2 * KL(teacher || student) at the targets (Hinton et al. 2015, arXiv:1503.02531: gradients of
    the softened distribution shrink as 1 / temperature^2, the factor gives them back).
    hard: cross entropy with the true targets.
    hidden: 1 - cosine of the last hidden states, over all tokens. Needs equal hidden sizes.
    """

    teacher: LanguageModel
    temperature: float
    weights: DistillWeights

    def __call__(self, model: nn.Module, batch: Batch) -> LossSum:
        with torch.no_grad():
            teacher = forward_batch(self.teacher, batch)
        student = forward_batch(model, batch)
        hard = cross_entropy(student.logits_NV, batch.targets)
        terms = {
            "soft": Term(soft_targets(teacher.logits_NV, student.logits_NV, self.temperature), self.weights.soft),
            "hard": Term(hard, self.weights.hard),
        }
        if self.weights.hidden:
            real_M = (batch.segments > 0).flatten()
            gap = hidden_gap(teacher.hidden_BTD.flatten(0, 1)[real_M], student.hidden_BTD.flatten(0, 1)[real_M])
            terms["hidden"] = Term(gap, self.weights.hidden, per="tokens")
        return LossSum(terms, {"accuracy": hits(student.logits_NV, batch.targets)})


def soft_targets(teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> Tensor:
    """temperature^2 * sum over N of KL(teacher || student) of the distributions softened by temperature, scalar."""
    log_p_NV = F.log_softmax(teacher_NV.float() / temperature, dim=-1)
    log_q_NV = F.log_softmax(student_NV.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)


def hidden_gap(teacher_MD: Tensor, student_MD: Tensor) -> Tensor:
    """Sum over M of 1 - cosine(teacher, student), scalar."""
    return (1.0 - F.cosine_similarity(student_MD.float(), teacher_MD.float(), dim=-1)).sum()

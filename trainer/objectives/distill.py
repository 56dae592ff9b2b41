"""Knowledge distillation of language models: the student matches the teacher's distribution and hidden states.
The teacher is frozen and seen through the same batches; who builds the two models is the distill stage.

Shapes: N target tokens, C of them at a time, V vocabulary, B rows, T tokens, D hidden size, M tokens of B * T that are
not padding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import DistillWeights
from trainer.data.stream import Batch
from trainer.heads import CrossEntropy, Sums
from trainer.models import LanguageModel
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
        real_M = None
        if self.weights.hidden:  # once, and before the teacher runs, as a GPU is waited for
            (real_M,) = (batch.segments > 0).flatten().nonzero(as_tuple=True)
        with torch.no_grad():
            teacher = self.teacher.at_targets(batch)

        def score(student_CV: Tensor, part: slice) -> Sums:
            with torch.no_grad():  # logits of this part only, as the student's: two [N, V] never exist
                teacher_CV = teacher.head.logits(teacher.hidden_ND[part])
            soft = soft_targets(teacher_CV, student_CV, self.temperature)
            return {"soft": soft, **CrossEntropy(batch.targets)(student_CV, part)}

        def score_hidden(student_BTD: Tensor) -> Sums:
            student_MD, teacher_MD = (x.flatten(0, 1)[real_M] for x in (student_BTD, teacher.hidden_BTD))
            return {"hidden": hidden_gap(teacher_MD, student_MD)}

        sums = model(batch=batch, score=score, score_hidden=score_hidden if self.weights.hidden else None)
        terms = {"soft": Term(sums["soft"], self.weights.soft), "hard": Term(sums["loss"], self.weights.hard)}
        if self.weights.hidden:
            terms["hidden"] = Term(sums["hidden"], self.weights.hidden, per="tokens")
        return LossSum(terms, {"accuracy": sums["accuracy"]})


def soft_targets(teacher_CV: Tensor, student_CV: Tensor, temperature: float) -> Tensor:
    """temperature^2 * sum over C of KL(teacher || student) of the distributions softened by temperature, scalar."""
    log_p_CV = F.log_softmax(teacher_CV.float() / temperature, dim=-1)
    log_q_CV = F.log_softmax(student_CV.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q_CV, log_p_CV, reduction="sum", log_target=True)


def hidden_gap(teacher_MD: Tensor, student_MD: Tensor) -> Tensor:
    """Sum over M of 1 - cosine(teacher, student), scalar."""
    return (1.0 - F.cosine_similarity(student_MD.float(), teacher_MD.float(), dim=-1)).sum()

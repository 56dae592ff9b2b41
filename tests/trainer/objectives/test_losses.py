import dataclasses

import numpy as np
import pytest
import torch

from tests.trainer.packed import logits
from trainer.config import DistillWeights, Model
from trainer.data.masking import masking
from trainer.data.packing import NO_TARGET, Framing, PackedRows
from trainer.data.stream import BatchPlan, TrainStream
from trainer.models import LanguageModel, build
from trainer.objectives.distill import Distillation, hidden_gap, soft_targets
from trainer.objectives.language_model import language_model
from trainer.objectives.loss import LossSum, Term

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}


def one_document_batch(tokens_in_memory, tokenizer, causal):
    """Rows of one document each, padded, so that transformers' own loss is defined on them."""
    draw = np.random.default_rng(0)
    texts = [list(map(int, draw.integers(5, 100, size=n))) for n in (28, 19, 25, 22)]
    framing = Framing(30, causal, 2, None if causal else 3, 0)
    mask = None if causal else masking(tokenizer, 0.2, True, 0)
    rows = PackedRows(tokens_in_memory(texts), framing, 0)
    assert len(rows) == 4
    return TrainStream(rows, mask, BatchPlan(4, 4, 0, 1), 0).micro_batches(0)[0]


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_loss_is_transformers_own(architecture, tokens_in_memory, tiny_tokenizer):
    causal = architecture == "gpt2"
    model = build(
        Model(architecture=architecture, config=GPT2 if causal else BERT), tiny_tokenizer, causal, 30, 0
    ).eval()
    batch = one_document_batch(tokens_in_memory, tiny_tokenizer, causal)
    ours = language_model(LanguageModel(model), batch).terms["loss"].total
    labels = torch.full_like(batch.input_ids, NO_TARGET).flatten()
    labels[batch.target_places] = batch.targets
    labels = labels.view_as(batch.input_ids)
    mask = (batch.segments > 0).long()
    if causal:  # transformers shifts inside; ours come shifted, so shift back
        labels = torch.cat([torch.full((4, 1), NO_TARGET), labels[:, :-1]], dim=1)
        kept = int((labels != NO_TARGET).sum())
        places = batch.target_places[batch.target_places % 30 != 29]
        assert kept == len(places)
        theirs = model(input_ids=batch.input_ids, attention_mask=mask, labels=labels).loss * kept
        last = batch.target_places % 30 == 29
        rest = dataclasses.replace(batch, target_places=batch.target_places[last], targets=batch.targets[last])
        theirs = theirs + torch.nn.functional.cross_entropy(
            logits(LanguageModel(model), rest), rest.targets, reduction="sum"
        )
    else:
        theirs = model(input_ids=batch.input_ids, attention_mask=mask, labels=labels).loss * batch.num_targets
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)


def test_loss_is_a_ten_line_loop(tokens_in_memory, tiny_tokenizer):
    model = build(Model(architecture="bert", config=BERT), tiny_tokenizer, False, 30, 0).eval()
    batch = one_document_batch(tokens_in_memory, tiny_tokenizer, False)
    total, right = 0.0, 0
    for place, target in zip(batch.target_places.tolist(), batch.targets.tolist(), strict=True):
        row, at = divmod(place, 30)
        inside = batch.segments[row] > 0
        logits = model(input_ids=batch.input_ids[row][inside][None]).logits[0, at].double()
        total += -(logits[target] - logits.exp().sum().log()).item()
        right += int(logits.argmax() == target)
    loss = language_model(LanguageModel(model), batch)
    assert loss.terms["loss"].total.item() == pytest.approx(total, rel=1e-6)
    assert loss.reported["accuracy"].item() == right


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_soft_targets_are_the_float64_formula(temperature):
    teacher, student = torch.randn(9, 50) * 3, torch.randn(9, 50) * 3
    p = torch.softmax(teacher.double() / temperature, -1)
    q = torch.softmax(student.double() / temperature, -1)
    expected = temperature**2 * (p * (p.log() - q.log())).sum()
    assert soft_targets(teacher, student, temperature).item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradient_of_soft_targets_keeps_its_size_at_high_temperature():
    """Hinton's reason for the factor: as temperature grows the gradient tends to (student - teacher) / V."""
    teacher, student = torch.randn(4, 20).double(), torch.randn(4, 20).double().requires_grad_()
    teacher, centred = teacher - teacher.mean(-1, keepdim=True), student - student.mean(-1, keepdim=True)
    soft_targets(teacher, student, 1000.0).backward()
    torch.testing.assert_close(student.grad, ((centred - teacher) / 20).detach(), rtol=1e-2, atol=1e-3)


def test_hidden_gap_is_zero_along_and_two_against():
    hidden = torch.randn(5, 8)
    assert hidden_gap(hidden, 3 * hidden).item() == pytest.approx(0, abs=1e-5)
    assert hidden_gap(hidden, -hidden).item() == pytest.approx(10, abs=1e-5)


def test_a_student_equal_to_its_teacher_has_only_the_hard_loss(tokens_in_memory, tiny_tokenizer):
    model = build(Model(architecture="bert", config=BERT), tiny_tokenizer, False, 30, 0).eval()
    batch = one_document_batch(tokens_in_memory, tiny_tokenizer, False)
    loss = Distillation(LanguageModel(model), 2.0, DistillWeights())(LanguageModel(model), batch)
    assert loss.terms["soft"].total.item() == pytest.approx(0, abs=1e-4)
    assert loss.terms["hidden"].total.item() == pytest.approx(0, abs=1e-3)
    assert loss.terms["hard"].total.item() == pytest.approx(
        language_model(LanguageModel(model), batch).terms["loss"].total.item()
    )


def test_padding_does_not_count_for_hidden_states(tokens_in_memory, tiny_tokenizer):
    teacher = build(Model(architecture="bert", config=BERT), tiny_tokenizer, False, 30, 0).eval()
    student = build(Model(architecture="bert", config=BERT), tiny_tokenizer, False, 30, 1).eval()
    batch = one_document_batch(tokens_in_memory, tiny_tokenizer, False)
    objective = Distillation(LanguageModel(teacher), 2.0, DistillWeights())
    before = objective(LanguageModel(student), batch).terms["hidden"].total
    batch.input_ids[batch.segments == 0] = 42
    assert torch.equal(before, objective(LanguageModel(student), batch).terms["hidden"].total)


def test_terms_are_divided_by_their_own_counts():
    loss = LossSum({"a": Term(torch.tensor(6.0), 2.0), "b": Term(torch.tensor(10.0), 0.5, "tokens")})
    assert loss.divided({"targets": 3.0, "tokens": 5.0}).item() == pytest.approx(2 * 2 + 0.5 * 2)

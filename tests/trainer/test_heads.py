"""The loss in parts against the loss as a whole: values, gradients, and what is kept in memory."""

import dataclasses

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from tests.trainer.packed import (
    CAUSAL,
    SHAPES,
    SMALL,
    everywhere,
    gradients,
    logits,
    make,
    packed_batch,
    scattered,
    with_targets,
)
from trainer.config import DistillWeights
from trainer.errors import UserError
from trainer.heads import _HEADS, _PLAIN, WHOLE, LossPlan, choose_loss_plan, memory_bytes
from trainer.models import LanguageModel
from trainer.objectives.distill import Distillation
from trainer.objectives.language_model import language_model

CPU = torch.device("cpu")


@pytest.fixture
def batch(tokens_in_memory):
    return lambda causal: everywhere(packed_batch(tokens_in_memory, causal))


def head_model(architecture, tokenizer):
    if architecture in SHAPES:
        return make(architecture, tokenizer)
    config = AutoConfig.for_model(
        architecture, vocab_size=100, pad_token_id=0, **SMALL | {"num_key_value_heads": 2, "head_dim": 8}
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("architecture", sorted({*_HEADS, *_PLAIN}))
def test_logits_at_targets_are_the_whole_models(architecture, tiny_tokenizer, batch):
    """Every architecture whose head is taken apart: alone on its targets it gives what the model as a whole gives."""
    model = scattered(head_model(architecture, tiny_tokenizer))
    full = batch(architecture not in _HEADS)
    inputs = full.input_ids[:1]  # one row, as one document
    with torch.no_grad():
        whole = model(input_ids=inputs).logits[0]

        places = torch.arange(inputs.shape[1])[5::7]
        one = dataclasses.replace(full, input_ids=inputs, isolated=False, target_places=places, targets=places)
        torch.testing.assert_close(logits(LanguageModel(model), one), whole[places], rtol=1e-5, atol=1e-5)


def test_an_architecture_nobody_looked_at_works_as_a_whole(tiny_tokenizer, batch):
    config = AutoConfig.for_model("opt", vocab_size=100, word_embed_proj_dim=32, ffn_dim=64, **SMALL)
    model = scattered(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval())

    one = batch(True)
    places = torch.arange(5, 30)
    one = dataclasses.replace(one, isolated=False, target_places=places, targets=one.input_ids.flatten()[places])
    loss = language_model(LanguageModel(model), one).terms["loss"].total
    expected = model(input_ids=one.input_ids).logits.flatten(0, 1)[places]
    expected = torch.nn.functional.cross_entropy(expected, one.targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    with pytest.raises(UserError, match="nothing is known about the head of architecture 'opt'"):
        choose_loss_plan("chunked", model, 8, False, CPU, print)
    said = []
    assert choose_loss_plan("auto", model, 2**40, False, CPU, said.append) == WHOLE
    assert said[0].startswith("cross_entropy auto: full")


def distillation(model, tokenizer):
    architecture = model.config.model_type
    teacher = LanguageModel(make(architecture, tokenizer)).requires_grad_(False)
    return Distillation(teacher, 2.0, DistillWeights())


OBJECTIVES = {"language_model": lambda model, tokenizer: language_model, "distill": distillation}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("architecture", SHAPES)
def test_parts_add_up_to_the_whole(architecture, objective, tiny_tokenizer, batch):
    """Loss terms, hits and the gradient of every parameter, tied embeddings among them, for parts of any size."""
    model = scattered(make(architecture, tiny_tokenizer))
    run = OBJECTIVES[objective](model, tiny_tokenizer)
    packed = batch(architecture in CAUSAL)
    counts = {"targets": float(packed.num_targets), "tokens": float(packed.num_tokens)}
    whole = run(LanguageModel(model), packed)
    expected = gradients(model, whole.divided(counts))
    assert {name for name, _ in model.named_parameters()} == expected.keys()
    for number in (2, 7, packed.num_targets, packed.num_targets + 3):  # of these, some are empty
        parts = run(LanguageModel(model, loss_plan=LossPlan(number)), packed)
        assert parts.reported["accuracy"] == whole.reported["accuracy"]
        for name, term in whole.terms.items():
            torch.testing.assert_close(parts.terms[name].total, term.total, rtol=1e-6, atol=1e-5)
        for name, gradient in gradients(model, parts.divided(counts)).items():
            largest = expected[name].abs().max().item()
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6 * max(1.0, largest), msg=name)


def test_gradients_of_many_parts_are_added_up_in_fp32(tiny_tokenizer, batch):
    """Under autocast: the head's gradient is as near to float32's from 46 parts as from the whole."""
    model = scattered(make("gpt2", tiny_tokenizer))
    packed = batch(True)
    counts = {"targets": float(packed.num_targets), "tokens": float(packed.num_tokens)}
    exact = gradients(model, language_model(LanguageModel(model), packed).divided(counts))["transformer.wte.weight"]

    def error(parts):
        with torch.autocast("cpu", torch.bfloat16):
            loss = language_model(LanguageModel(model, loss_plan=LossPlan(parts)), packed).divided(counts)
        return (gradients(model, loss)["transformer.wte.weight"] - exact).norm() / exact.norm()

    assert error(46) < 1.1 * error(1)


@pytest.mark.parametrize("targets", [0, 3, 92])
def test_the_head_is_called_equally_often_whatever_the_targets(targets, tiny_tokenizer, batch):
    """Under ZeRO-3 a call gathers weights from all ranks, and ranks have unequal numbers of targets."""
    model = make("bert", tiny_tokenizer)
    calls = []
    model.cls.predictions.decoder.register_forward_hook(lambda *seen: calls.append(1))
    packed = batch(False)
    packed = with_targets(packed, packed.target_places[:targets])
    loss = language_model(LanguageModel(model, loss_plan=LossPlan(5)), packed).terms["loss"].total
    assert len(calls) == 5
    loss.backward()
    assert len(calls) == 5 + 4  # the last part's logits are still there


def test_a_part_left_out_is_noticed(tiny_tokenizer, batch, monkeypatch):
    """The comparison can fail: targets that belong to the part before."""
    model = scattered(make("bert", tiny_tokenizer))
    packed = batch(False)
    whole = language_model(LanguageModel(model), packed).terms["loss"].total
    monkeypatch.setattr("trainer.heads._part", lambda head, hidden, score, part, plan: score(
        head.logits(hidden), slice(max(0, part.start - 1), max(0, part.start - 1) + len(hidden))))  # fmt: skip
    parts = language_model(LanguageModel(model, loss_plan=LossPlan(7)), packed).terms["loss"].total
    assert (parts - whole).abs() > 1


def saved_sizes(run):
    """Number of elements of each tensor kept for the backward pass, and the result."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return sizes, result


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logits_of_a_large_vocabulary_never_exist_together(objective, tiny_tokenizer, batch):
    model = make("gpt2", tiny_tokenizer, vocab_size=5000)
    teacher = LanguageModel(make("gpt2", tiny_tokenizer, vocab_size=5000)).requires_grad_(False)
    run = language_model if objective == "language_model" else Distillation(teacher, 2.0, DistillWeights())
    packed = batch(True)
    whole_size = packed.num_targets * 5000
    at_once = -(-packed.num_targets // 10)
    sizes, _ = saved_sizes(lambda: run(LanguageModel(model), packed))
    assert max(sizes) == whole_size
    sizes, loss = saved_sizes(lambda: run(LanguageModel(model, loss_plan=LossPlan(10)), packed))
    table = max(p.numel() for p in model.parameters())
    assert max(sizes) <= max(table, at_once * 5000) < whole_size / 2
    made = []
    real = torch.nn.functional.log_softmax
    with pytest.MonkeyPatch.context() as patch:  # what the backward pass makes again
        patch.setattr("torch.nn.functional.log_softmax", lambda x, **more: made.append(x.numel()) or real(x, **more))
        loss.divided({"targets": 1.0, "tokens": 1.0}).backward()
    assert max(made, default=0) <= at_once * 5000
    assert bool(made) == (objective == "distill")


def test_half_precision_makes_no_whole_float32_copy(tiny_tokenizer, batch):
    model = make("bert", tiny_tokenizer, vocab_size=5000)
    packed = batch(False)
    with torch.autocast("cpu", torch.bfloat16):
        whole = language_model(LanguageModel(model), packed).terms["loss"].total
        module = LanguageModel(model, loss_plan=LossPlan(10))
        sizes, loss = saved_sizes(lambda: language_model(module, packed).terms["loss"].total)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, whole, rtol=1e-4, atol=0)
    assert max(sizes) < packed.num_targets * 5000 / 2
    expected, got = gradients(model, whole), gradients(model, loss)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0.05, atol=0.02 * expected[name].abs().max().item())


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("plan", [WHOLE, LossPlan(4)])
def test_a_batch_without_targets_reaches_every_parameter(architecture, plan, tiny_tokenizer, batch):
    """Under DDP a parameter that is missing from one rank's graph stops them all."""
    model = make(architecture, tiny_tokenizer)
    loss = language_model(LanguageModel(model, loss_plan=plan), batch(architecture in CAUSAL).without_targets())
    assert loss.terms["loss"].total == 0
    zeros = gradients(model, loss.terms["loss"].total)
    assert zeros.keys() == {name for name, _ in model.named_parameters()}
    assert all(gradient.abs().max() == 0 for gradient in zeros.values())


def test_evaluation_keeps_nothing(tiny_tokenizer, batch):
    model = LanguageModel(make("llama", tiny_tokenizer), loss_plan=LossPlan(5)).eval()
    with torch.inference_mode():
        parts = language_model(model, batch(True)).terms["loss"].total
    whole = language_model(LanguageModel(model.model), batch(True)).terms["loss"].total
    torch.testing.assert_close(parts, whole.detach())


def test_the_plan_follows_the_size_of_the_logits(tiny_tokenizer):
    model = make("bert", tiny_tokenizer, vocab_size=2**17)
    fits = memory_bytes(CPU) // 16 // (4 * 2**17)
    parts = -(-fits // 512)  # of 256 MiB
    said = []
    assert choose_loss_plan("auto", model, fits - 1, False, CPU, said.append) == WHOLE
    assert choose_loss_plan("auto", model, fits + 1, False, CPU, said.append).parts in (parts, parts + 1)
    assert choose_loss_plan("auto", model, fits - 1, True, CPU, said.append).parts in (parts - 1, parts)
    assert [line.split(" (")[0].split()[-1] for line in said] == ["full", "chunked", "chunked"]
    assert choose_loss_plan("full", model, 2 * fits, False, CPU, said.append) == WHOLE
    assert choose_loss_plan("chunked", model, 1025, False, CPU, said.append) == LossPlan(3)
    assert len(said) == 3


def test_liger_that_cannot_run_is_an_error(tiny_tokenizer):
    model = make("bert", tiny_tokenizer)
    with pytest.raises(UserError, match="no loss for distillation"):
        choose_loss_plan("liger", model, 8, True, CPU, print)
    with pytest.raises(UserError, match="no package liger-kernel|does not run on cpu"):
        choose_loss_plan("liger", model, 8, False, CPU, print)

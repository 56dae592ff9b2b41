"""Regional compilation: one compilation serves every step, whatever the number of targets, also with checkpointing."""

import warnings

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tests.trainer.packed import (
    CAUSAL,
    SHAPES,
    attention_by_documents,
    everywhere,
    logits,
    make,
    packed_batch,
    with_kernel,
    with_targets,
)
from trainer import heads
from trainer.data.packing import Framing, PackedRows
from trainer.data.stream import BatchPlan, TrainStream
from trainer.heads import LossPlan
from trainer.models import LanguageModel, checkpoint_layers, transformer_layers
from trainer.objectives.language_model import language_model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2", "llama"])
def test_twenty_steps_of_varying_targets_compile_nothing_anew(
    architecture, checkpointing, tiny_tokenizer, tokens_in_memory
):
    """The compiler behind dynamo is left out: whether it is called again is decided in front of it."""
    torch._dynamo.reset()
    counters.clear()
    model = make(architecture, tiny_tokenizer).train()
    if checkpointing:
        checkpoint_layers(model)
    module = LanguageModel(model)
    for layer in transformer_layers(model):
        layer.compile(backend="eager")
    batch = packed_batch(tokens_in_memory, architecture in CAUSAL)
    real = (batch.segments > 0).flatten().nonzero().squeeze(1)
    for step in range(20):
        if step == 1:
            compiled = dict(counters["stats"])
        loss = language_model(module, with_targets(batch, real[step % 5 :: 2 + step % 3])).terms["loss"].total
        loss.backward()
        model.zero_grad()
    assert compiled["unique_graphs"] >= 1
    assert counters["stats"] == compiled
    assert not counters["graph_break"]


@pytest.mark.parametrize("parts", [1, 3])
def test_compiled_cross_entropy_is_the_eager_one(parts, tiny_tokenizer, tokens_in_memory, monkeypatch):
    """Sums and gradients; after the first two numbers of targets no other is compiled for."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(heads._sums, backend="aot_eager")
    monkeypatch.setattr(heads, "compiled_sums", lambda: compiled)
    model = make("gpt2", tiny_tokenizer).eval()  # without dropout
    batch = packed_batch(tokens_in_memory, causal=True)
    real = (batch.segments > 0).flatten().nonzero().squeeze(1)
    for step in range(8):
        one = with_targets(batch, real[step % 5 :: 2 + step % 3])
        found = {}
        for plan in (LossPlan(parts), LossPlan(parts, compiled=True)):
            loss = language_model(LanguageModel(model, loss_plan=plan), one)
            loss.terms["loss"].total.backward()
            found[plan.compiled] = (loss, [parameter.grad.clone() for parameter in model.parameters()])
            model.zero_grad()
        torch.testing.assert_close(found[True][0].terms["loss"].total, found[False][0].terms["loss"].total)
        assert found[True][0].reported == found[False][0].reported
        torch.testing.assert_close(found[True][1], found[False][1])
        if step == 2:
            graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs == counters["stats"]["unique_graphs"] <= 3


@torch.library.custom_op("lmworks_tests::by_documents", mutates_args={})
def by_documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: torch.Tensor, longest: int, scale: float,
    back: int, ahead: int,
) -> torch.Tensor:  # fmt: skip
    assert longest >= borders.diff().max()
    return attention_by_documents(query, key, value, borders, scale, back, ahead).contiguous()


@by_documents.register_fake
def _(query, key, value, borders, longest, scale, back, ahead):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2", "llama"])
def test_varying_documents_compile_once_for_all_numbers(architecture, tiny_tokenizer, tokens_in_memory, monkeypatch):
    """varlen, with an operator in the place of torch's that runs on a CPU: at the second step dynamo learns that the
    number of documents and the longest vary, and from then on nothing is compiled."""

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        return by_documents(query, key, value, cu_q, max_q, scale, *window_size)

    monkeypatch.setattr("trainer.attention.varlen_attn", varlen_attn)
    torch._dynamo.reset()
    counters.clear()
    module = with_kernel(make(architecture, tiny_tokenizer, length=256), "varlen")
    plain = with_kernel(make(architecture, tiny_tokenizer, length=256), "varlen")
    for layer in transformer_layers(module.model):
        layer.compile(backend="eager")
    draw = np.random.default_rng(0)
    for step in range(10):
        sizes = draw.integers(3, 250 if step % 2 else 100, size=12)
        framing = Framing(256, architecture in CAUSAL, 2, None if architecture in CAUSAL else 3, 0)
        rows = PackedRows(tokens_in_memory([list(map(int, draw.integers(5, 100, size=n))) for n in sizes]), framing, 0)
        batch = everywhere(TrainStream(rows, None, BatchPlan(2, 2, 0, 1), 0).micro_batches(0)[0])
        with torch.no_grad():
            torch.testing.assert_close(logits(module, batch), logits(plain, batch))
        if step == 3:
            compiled = dict(counters["stats"])
    assert counters["stats"] == compiled
    assert not counters["graph_break"]


@pytest.mark.parametrize("architecture", SHAPES)
def test_checkpointing_is_asked_for_by_a_name_that_does_not_warn(architecture, tiny_tokenizer, tokens_in_memory):
    model = make(architecture, tiny_tokenizer).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        checkpoint_layers(model)
    batch = packed_batch(tokens_in_memory, architecture in CAUSAL)
    forwards = []
    layer = transformer_layers(model)[0]
    module = next(
        child for child in layer.modules() if isinstance(child, torch.nn.LayerNorm) or "Norm" in type(child).__name__
    )
    module.register_forward_hook(lambda *seen: forwards.append(1))
    places = (batch.segments > 0).flatten().nonzero().squeeze(1)
    language_model(LanguageModel(model), with_targets(batch, places)).terms["loss"].total.backward()
    assert len(forwards) == 2  # once more in the backward pass

"""Regional compilation: one compilation serves every step, whatever the number of targets, also with checkpointing."""

import warnings

import pytest
import torch
from torch._dynamo.utils import counters

from tests.trainer.packed import CAUSAL, SHAPES, make, packed_batch, with_targets
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

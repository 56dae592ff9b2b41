"""The loss in parts and Liger's kernel, on a GPU in bf16, against the loss as a whole; and what they keep in memory."""

import importlib.util

import pytest
import torch

from tests.trainer.packed import CAUSAL, everywhere, gradients, make, packed_batch
from trainer.heads import WHOLE, LossPlan
from trainer.models import LanguageModel
from trainer.objectives.language_model import language_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("plan", [LossPlan(7), LossPlan(7, liger=True)], ids=["chunked", "liger"])
def test_loss_and_gradients_are_those_of_the_whole(architecture, plan, tiny_tokenizer, tokens_in_memory):
    if plan.liger and importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("no package liger-kernel")
    model = make(architecture, tiny_tokenizer, vocab_size=20_000).cuda()
    batch = everywhere(packed_batch(tokens_in_memory, architecture in CAUSAL)).to(torch.device("cuda"))
    losses, all_gradients, peaks = [], [], []
    for each in (WHOLE, plan):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = language_model(LanguageModel(model, loss_plan=each), batch)
        losses.append(loss.terms["loss"].total.item())
        all_gradients.append(gradients(model, loss.terms["loss"].total / batch.num_targets))
        peaks.append(torch.cuda.max_memory_allocated())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert peaks[1] < peaks[0]
    floor = 0.01 * max(gradient.norm() for gradient in all_gradients[0].values())  # a key's bias has 0 but for rounding
    for name, gradient in all_gradients[0].items():
        assert (all_gradients[1][name] - gradient).norm() < 0.05 * gradient.norm().clamp_min(floor), name

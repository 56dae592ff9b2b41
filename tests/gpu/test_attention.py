"""The attention kernels themselves, on a GPU: bf16 against sdpa in float32, and not one bit of a neighbour."""

import dataclasses

import pytest
import torch
from transformers.utils.import_utils import is_flash_attn_2_available

from tests.trainer.packed import CAUSAL, SHAPES, everywhere, gradients, logits, make, packed_batch, with_kernel
from trainer.attention import check_isolation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
KERNELS = ["sdpa", "varlen", "flash_attention_2", "flex_attention"]
LENGTH = 256  # two blocks of 128, the unit of most kernels


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("no package flash-attn")
    return request.param


@pytest.fixture(params=SHAPES)
def architecture(request, kernel):
    if (kernel, request.param) == ("flex_attention", "gpt2"):
        pytest.skip("transformers offers no flex_attention for gpt2")
    return request.param


@pytest.fixture
def model(architecture, tiny_tokenizer):
    """Heads of 64, which all kernels take; no dropout, which flex and varlen do not have."""
    sizes = {
        "bert": ("hidden_size", "num_attention_heads"),
        "distilbert": ("dim", "n_heads"),
        "gpt2": ("n_embd", "n_head"),
    }
    width, heads = sizes.get(architecture, sizes["bert"])
    torch.manual_seed(0)
    return make(architecture, tiny_tokenizer, length=LENGTH, **{width: 256, heads: 4}).cuda()


@pytest.fixture
def batch(architecture, tokens_in_memory):
    return everywhere(packed_batch(tokens_in_memory, architecture in CAUSAL, LENGTH, rows=1)).to(torch.device("cuda"))


def test_kernel_is_sdpa_within_bf16(kernel, model, batch):
    """Forward and gradients, relative to the largest. On a CPU bf16 alone was off by up to 0.008 and 0.016, a mask
    without borders by at least 0.022 and 0.26, in each of the six architectures."""
    weights = torch.randn(len(batch.targets), model.config.vocab_size, device="cuda")
    expected = logits(with_kernel(model, "sdpa"), batch)
    expected_gradients = gradients(model, (expected * weights).sum())
    with torch.autocast("cuda", torch.bfloat16):
        ours = logits(with_kernel(model, kernel), batch)
    ours_gradients = gradients(model, (ours.float() * weights).sum())
    assert (ours.float() - expected).abs().max() < 0.015 * expected.abs().max()
    floor = 0.01 * max(
        gradient.norm() for gradient in expected_gradients.values()
    )  # a key's bias has 0 but for rounding
    for name, gradient in expected_gradients.items():
        assert (ours_gradients[name] - gradient).norm() < 0.05 * gradient.norm().clamp_min(floor), name


def test_changing_a_document_moves_no_bit_of_its_neighbours(kernel, model, batch):
    module = with_kernel(model, kernel)
    changed = batch.input_ids.clone()
    first = batch.segments == 1
    changed[first] = changed[first].flip(0)
    others = ((batch.segments != 1) & (batch.segments > 0)).flatten().nonzero().squeeze(1)
    batch = dataclasses.replace(batch, target_places=others, targets=others)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        before, after = (
            logits(module, dataclasses.replace(batch, input_ids=ids)) for ids in (batch.input_ids, changed)
        )
    assert torch.equal(before, after)


def test_isolation_check_passes(kernel, model):
    with torch.autocast("cuda", torch.bfloat16):
        check_isolation(with_kernel(model, kernel), model.config, "bf16", 4, LENGTH)

"""Each kernel against plain attention. The flash kernels do not run on a CPU: here everything around them does, with
attention written out in their place; tests/gpu holds the kernels themselves against the same."""

import dataclasses

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash

from tests.trainer.packed import (
    CAUSAL,
    SHAPES,
    attention_by_documents,
    everywhere,
    gradients,
    logits,
    make,
    packed_batch,
    scattered,
    with_kernel,
    with_targets,
)
from trainer import attention
from trainer.attention import attention_dropout, check_isolation, choose_attention, packed_inputs
from trainer.errors import UserError
from trainer.models import LanguageModel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def varlen_written_out(monkeypatch):
    """torch's varlen_attn by its documentation, for the CPU."""

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32 and max_q == max_k >= cu_q.diff().max()
        assert enable_gqa or query.shape[1] == key.shape[1]
        return attention_by_documents(query, key, value, cu_q, scale, *window_size)

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)


@pytest.fixture
def flash_written_out(monkeypatch):
    """The function of the package flash-attn that transformers calls for packed rows, by its documentation."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size=(-1, -1),
    ):  # fmt: skip
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q >= cu_seqlens_q.diff().max() and dropout_p == 0
        back, ahead = window_size
        return attention_by_documents(q, k, v, cu_seqlens_q, softmax_scale, back, 0 if causal else ahead)

    monkeypatch.setattr(flash, "_lazy_imports", lambda *names, **more: (None, flash_attn_varlen_func, None, None, None))
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    # transformers looks for the package before it lets a model have it
    monkeypatch.setattr(attention, "_set", lambda model, kernel: setattr(model.config, "_attn_implementation", kernel))


def plain(model, batch):
    """Logits of transformers' own eager attention, every mask written out as numbers to be added."""
    causal = model.config.model_type in CAUSAL
    length = batch.segments.shape[1]
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    seen = batch.segments[:, None, :, None] == batch.segments[:, None, None, :]
    seen = seen & (distance <= 0) if causal else seen

    def added(mask):
        return torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)

    mask = added(seen)
    if model.config.model_type == "modernbert":
        near = seen & (distance.abs() <= SHAPES["modernbert"]["local_attention"] // 2)
        mask = {"full_attention": mask, "sliding_attention": added(near)}
    model.set_attn_implementation("eager")
    positions = batch.positions + (1 if model.config.model_type == "roberta" else 0)  # its pad id is 0
    output = model(input_ids=batch.input_ids, attention_mask=mask, position_ids=positions)
    return output.logits.flatten(0, 1)[batch.target_places]


def same_as_plain(kernel, architecture, tokenizer, tokens_in_memory):
    """Logits and all gradients, in float64 (some softmaxes stay float32), so that no mistake passes for rounding."""
    batch = everywhere(packed_batch(tokens_in_memory, architecture in CAUSAL))
    model = scattered(make(architecture, tokenizer)).double()
    weights = torch.randn(len(batch.targets), model.config.vocab_size, dtype=torch.float64)
    expected = plain(model, batch)
    expected_gradients = gradients(model, (expected * weights).sum())
    ours = logits(with_kernel(model, kernel), batch)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    ours_gradients = gradients(model, (ours * weights).sum())
    assert ours_gradients.keys() == expected_gradients.keys()
    for name, expected_gradient in expected_gradients.items():
        largest = max(0.1, expected_gradient.abs().max().item())  # of a key's bias it is 0 but for rounding
        torch.testing.assert_close(ours_gradients[name], expected_gradient, rtol=1e-5, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("architecture", SHAPES)
def test_sdpa_is_plain_attention(architecture, tiny_tokenizer, tokens_in_memory):
    same_as_plain("sdpa", architecture, tiny_tokenizer, tokens_in_memory)


@pytest.mark.parametrize("architecture", SHAPES)
def test_varlen_is_given_what_makes_it_plain_attention(
    architecture, tiny_tokenizer, tokens_in_memory, varlen_written_out
):
    same_as_plain("varlen", architecture, tiny_tokenizer, tokens_in_memory)


@pytest.mark.parametrize("architecture", SHAPES)
def test_flash_is_given_what_makes_it_plain_attention(
    architecture, tiny_tokenizer, tokens_in_memory, flash_written_out, monkeypatch
):
    monkeypatch.setattr("tests.trainer.packed._set", attention._set)
    same_as_plain("flash_attention_2", architecture, tiny_tokenizer, tokens_in_memory)


@pytest.mark.parametrize("architecture", [name for name in SHAPES if name != "gpt2"])
def test_flex_is_sdpa(architecture, tiny_tokenizer, tokens_in_memory):
    """Forward only: flex_attention has no backward on a CPU. Not compiled, which takes half a minute a model."""
    batch = everywhere(packed_batch(tokens_in_memory, architecture in CAUSAL))
    model = scattered(make(architecture, tiny_tokenizer))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = logits(with_kernel(model, "sdpa"), batch)
        torch.testing.assert_close(logits(with_kernel(model, "flex_attention"), batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", SHAPES)
def test_borders_given_wrong_are_noticed(
    architecture, tiny_tokenizer, tokens_in_memory, varlen_written_out, monkeypatch
):
    """The parity tests can fail: rows without borders between their documents give other logits."""
    batch = everywhere(packed_batch(tokens_in_memory, architecture in CAUSAL))
    rows, length = batch.segments.shape
    wrong = dataclasses.replace(
        batch, boundaries=torch.arange(0, rows * length + 1, length, dtype=torch.int32), longest=length
    )
    module = with_kernel(scattered(make(architecture, tiny_tokenizer)), "varlen")
    with torch.no_grad():
        assert (logits(module, batch) - logits(module, wrong)).abs().max() > 1e-2


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
@pytest.mark.parametrize("architecture", SHAPES)
def test_changing_a_document_moves_no_logit_of_its_neighbours(
    architecture, kernel, tiny_tokenizer, tokens_in_memory, varlen_written_out
):
    model = with_kernel(scattered(make(architecture, tiny_tokenizer)), kernel)
    batch = packed_batch(tokens_in_memory, architecture in CAUSAL)
    row = int((batch.segments.max(dim=1).values >= 2).nonzero()[0])
    changed = batch.input_ids.clone()
    first = batch.segments[row] == 1
    changed[row][first] = changed[row][first].flip(0)
    changed[row, 0] = 77
    others = ((batch.segments != 1) & (batch.segments > 0)).flatten().nonzero().squeeze(1)
    batch = with_targets(batch, others)
    with torch.no_grad():
        before, after = (logits(model, dataclasses.replace(batch, input_ids=ids)) for ids in (batch.input_ids, changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
@pytest.mark.parametrize("architecture", SHAPES)
def test_isolation_check_passes_and_catches_a_leak(
    architecture, kernel, tiny_tokenizer, varlen_written_out, monkeypatch
):
    model = scattered(make(architecture, tiny_tokenizer))
    module = with_kernel(model, kernel)
    check_isolation(module, model.config, "fp32", 1, 16)
    check_isolation(module, model.config, "fp32", 2, 32)

    def without_borders(config, causal, kernel, batch):
        rows, length = batch.segments.shape
        running = torch.arange(length)[None].expand(rows, -1)
        borders = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
        whole = dataclasses.replace(
            batch, segments=torch.ones_like(batch.segments), positions=running, boundaries=borders, longest=length
        )
        return packed_inputs(config, causal, kernel, whole)

    monkeypatch.setattr("trainer.models.packed_inputs", without_borders)
    for precision in ("fp32", "bf16"):
        with pytest.raises(UserError, match="mixes the documents"):
            check_isolation(module, model.config, precision, 2, 32)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_isolation_check_catches_positions_that_run_on(architecture, tiny_tokenizer, monkeypatch):
    """Documents that do not see each other, but whose positions count from the start of the row."""
    model = scattered(make(architecture, tiny_tokenizer))

    def running_positions(config, causal, kernel, batch):
        inputs = packed_inputs(config, causal, kernel, batch)
        length = batch.segments.shape[1]
        before = torch.arange(length)
        seen = (batch.segments[:, None, :, None] == batch.segments[:, None, None, :]) & (
            (before[None, :] <= before[:, None]) | (not causal)
        )
        return inputs | {"position_ids": before[None].expand_as(batch.positions), "attention_mask": seen}

    monkeypatch.setattr("trainer.models.packed_inputs", running_positions)
    for precision in ("fp32", "bf16"):
        with pytest.raises(UserError, match="mixes the documents"):
            check_isolation(LanguageModel(model), model.config, precision, 1, 16)


def choice(wanted, model, device, precision="bf16", dropout=0.0, isolated=True):
    said = []
    return choose_attention(wanted, model, isolated, device, precision, dropout, said.append), said


def test_on_a_cpu_it_is_sdpa_and_says_so(tiny_tokenizer):
    model = make("bert", tiny_tokenizer)
    assert choice("auto", model, CPU) == ("sdpa", ["attention auto: sdpa (the one that trains on cpu)"])
    assert choice("sdpa", model, CPU) == ("sdpa", [])
    for kernel in ("varlen", "flash_attention_2", "flex_attention"):
        with pytest.raises(UserError, match=rf"attention {kernel}: it does not train on cpu"):
            choice(kernel, model, CPU)


@pytest.fixture
def a_gpu(monkeypatch):
    """What is asked about a GPU, answered as an H100 would; flash-attn is not installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_on_a_gpu_auto_takes_the_fastest_that_is_right(tiny_tokenizer, a_gpu):
    model = make("bert", tiny_tokenizer)
    kernel, (said,) = choice("auto", model, CUDA)
    assert kernel == model.config._attn_implementation == "varlen"
    assert said == "attention auto: varlen (computes nothing between documents)"
    kernel, (said,) = choice("auto", model, CUDA, dropout=0.1)
    assert kernel == model.config._attn_implementation == "sdpa"
    assert "no varlen: it has no dropout" in said and "no flash_attention_2: no package flash-attn" in said
    assert choice("auto", model, CUDA, precision="fp32")[0] == "sdpa"
    assert choice("auto", model, CUDA, isolated=False)[0] == "sdpa"
    odd = make("bert", tiny_tokenizer, hidden_size=36)
    kernel, (said,) = choice("auto", odd, CUDA)
    assert kernel == "sdpa" and "heads of a multiple of 8 up to 256, not 9" in said


def test_an_older_gpu_takes_sdpa(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    kernel, (said,) = choice("auto", make("llama", tiny_tokenizer), CUDA, precision="fp16")
    assert kernel == "sdpa" and "compute capability 8.0" in said


def test_a_choice_that_cannot_be_had_is_an_error(tiny_tokenizer, a_gpu):
    bert, gpt2 = make("bert", tiny_tokenizer), make("gpt2", tiny_tokenizer)
    with pytest.raises(UserError, match="no package flash-attn"):
        choice("flash_attention_2", bert, CUDA)
    with pytest.raises(UserError, match=r"flex_attention: it has no dropout, and the model's attention has 0.1"):
        choice("flex_attention", bert, CUDA, dropout=0.1)
    with pytest.raises(UserError, match="not in fp32"):
        choice("varlen", bert, CUDA, precision="fp32")
    with pytest.raises(UserError, match="transformers does not offer it for gpt2"):
        choice("flex_attention", gpt2, CUDA)
    assert gpt2.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("architecture", SHAPES)
def test_attention_dropout_is_found_under_every_name(architecture, tiny_tokenizer):
    key = {"distilbert": "attention_dropout", "gpt2": "attn_pdrop", "modernbert": "attention_dropout"}
    key = key.get(architecture, "attention_dropout" if architecture == "llama" else "attention_probs_dropout_prob")
    assert attention_dropout(make(architecture, tiny_tokenizer, **{key: 0.25}).config) == 0.25
    assert attention_dropout(make(architecture, tiny_tokenizer, **{key: 0.0}).config) == 0.0


def test_varlen_refuses_what_it_would_leave_out(tiny_tokenizer, tokens_in_memory, varlen_written_out):
    model = make("bert", tiny_tokenizer, attention_probs_dropout_prob=0.1)
    module = with_kernel(model, "varlen").train()
    with pytest.raises(UserError, match="without dropout"):
        logits(module, packed_batch(tokens_in_memory, False))
    with pytest.raises(UserError, match="documents given by their borders"):
        model.eval()(input_ids=torch.arange(8)[None])

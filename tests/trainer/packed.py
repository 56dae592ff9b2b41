"""What tests of attention share: small models of every architecture, packed rows, and attention written out."""

import dataclasses

import numpy as np
import torch
from torch.nn import functional as F

from trainer.attention import _set
from trainer.config import Model
from trainer.data.packing import Framing, PackedRows
from trainer.data.stream import Batch, BatchPlan, TrainStream
from trainer.models import LanguageModel, build

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
SHAPES = {
    "bert": SMALL,
    "roberta": SMALL,
    "distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64},
    "modernbert": SMALL | {"local_attention": 8},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "llama": SMALL | {"num_key_value_heads": 2},
}
CAUSAL = {"gpt2", "llama"}


def make(architecture, tokenizer, length=32, **more):
    """A fresh model, in eval mode."""
    model = Model(architecture=architecture, config=SHAPES[architecture] | more)
    return build(model, tokenizer, architecture in CAUSAL, length, seed=1).eval()


def scattered(model):
    """Fresh models have zero biases, unit norms and small weights, which hide mistakes; move everything."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def packed_batch(tokens_in_memory, causal, length=32, rows=3) -> Batch:
    """Rows of unequal documents, with padding at their ends."""
    draw = np.random.default_rng(0)
    texts = [list(map(int, draw.integers(5, 100, size=n))) for n in (5, 9, 12, 20, 7, 3, 14, 28, 30, 6)]
    framing = Framing(length, causal, 2, None if causal else 3, 0)
    stream = TrainStream(PackedRows(tokens_in_memory(texts), framing, 0), None, BatchPlan(rows, rows, 0, 1), 0)
    return stream.micro_batches(0)[0]


def everywhere(batch: Batch) -> Batch:
    """The same rows with each token that is not padding as a target of its own id."""
    places = (batch.segments > 0).flatten().nonzero().squeeze(1)
    return with_targets(batch, places)


def with_targets(batch: Batch, places) -> Batch:

    return dataclasses.replace(batch, target_places=places, targets=batch.input_ids.flatten()[places])


def logits(model, batch: Batch):
    """Logits [N, V] at the batch's targets."""
    return model(batch=batch, score=lambda logits_NV, part: {"logits": logits_NV})["logits"]


def with_kernel(model, kernel) -> LanguageModel:
    _set(model, kernel)
    return LanguageModel(model, kernel)


def gradients(model, total):
    """Of every parameter, by name, of a scalar."""
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def attention_by_documents(query, key, value, boundaries, scale, back, ahead):
    """Attention of each document by itself, [S, H, D]: what a varlen kernel is documented to do.

    A token sees `back` tokens before it and `ahead` after it; -1: all. Fewer key heads are shared by query heads.
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    parts = []
    for start, stop in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        distance = torch.arange(stop - start)[None, :] - torch.arange(stop - start)[:, None]  # key - query
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen &= (distance >= -back) if back >= 0 else seen
        seen &= (distance <= ahead) if ahead >= 0 else seen
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(0, 1))
    return torch.cat(parts)

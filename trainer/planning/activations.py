"""Bytes that autograd keeps of one micro-batch, tensor by tensor as transformers' modules and our objective make them.
Weights, gradients and optimizer state are `memory`'s; kernels that fuse (torch.compile, Liger's norms) keep less.

The count follows Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1: 34 bytes x tokens x D a block in 16 bits with
dropout, plus 5 a T T b for attention). It differs where our blocks do: SDPA and flash kernels keep Q, K, V, their
output and one log-sum-exp a head and token instead of T x T; a mask that keeps packed documents apart is kept by each
block as an additive copy, B x T x T (not for flex and flash attention); gelu_new is written in elementary operations
and keeps five tensors of size F; RMSNorm keeps its input twice; autocast keeps fp32 residuals, and a 16-bit copy of a
tensor for each matrix product that reads it.

Shapes: B rows, T tokens in a row, M = B * T tokens, N target tokens, D hidden size, F inner size, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal

from trainer.planning.shapes import Shape

Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp8"]
CrossEntropy = Literal["full", "chunked", "liger"]

_STATISTICS = 8  # mean and reciprocal deviation of one normalised token, fp32 both
_INDEX = 8  # int64


@dataclass(frozen=True)
class Numerics:
    """Bytes of an element, by where the tensor stands."""

    matrix: int  # inputs and outputs of matrix products
    stream: int  # the residual stream, and what norms give out
    power: int  # what torch.pow reads and gives on: autocast on CUDA has it in its fp32 list
    odd_norm: int  # input of a norm that does not read the stream: fp32 under autocast on CUDA, as it was on the CPU
    dropped: int  # one element of what dropout keeps: a bool in CUDA's fused kernel, its noise on the CPU
    casts: bool  # autocast: each matrix product that reads an fp32 tensor keeps its own 16-bit copy
    kept_scores: bool  # attention with dropout falls to elementary operations on the CPU, which keep T x T

    @staticmethod
    def of(precision: Precision, autocast: bool, cuda: bool) -> "Numerics":
        """`autocast`: 16-bit products over fp32 parameters (ddp, fsdp2); else parameters have that type (DeepSpeed)."""
        half = precision not in ("fp32", "tf32")
        small = 2 if half else 4
        return Numerics(
            matrix=small,
            stream=4 if autocast else small,
            power=4 if half and autocast and cuda else small,
            odd_norm=4 if half and autocast and cuda else small,
            dropped=1 if cuda else small,
            casts=half and autocast,
            kept_scores=not cuda,
        )


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees."""

    rows: int  # B
    length: int  # T
    targets: int  # N
    isolated: bool  # documents of a row are kept apart by a mask
    dense_mask: bool = True  # that mask is a tensor (SDPA), not a block structure (flex, flash attention)
    checkpointing: bool = False
    cross_entropy: CrossEntropy = "full"

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def mask_elements(self) -> int:
        """B x T x T where there is a mask tensor, else 0."""
        return self.rows * self.length**2 if self.isolated and self.dense_mask else 0


@dataclass(frozen=True)
class Activations:
    """Bytes by part. `kept` is what is held when the backward pass begins; the others are added for a while."""

    blocks: float  # kept by the blocks, or their inputs alone under checkpointing
    ends: float  # embeddings, last norm, rotary tables, masks
    head: float  # inputs of the head at target tokens, and of a loss on hidden states
    logits: float  # log-probabilities, fp32
    logits_forward: float  # more of their size while the loss is computed
    logits_backward: float  # more of their size while it is differentiated
    window: float  # one block, recomputed (checkpointing)
    block_gradients: float  # gradients of activations while one block is differentiated
    unseen: float  # part of `ends` that is held by Python, not by autograd

    @property
    def kept(self) -> float:
        return self.blocks + self.ends + self.head + self.logits

    @property
    def saved(self) -> float:
        """What autograd itself holds at the end of the forward pass: what `probe` counts."""
        return self.kept - self.unseen


# Log-probabilities of one part under `chunked`, at the most (trainer/heads.py: 2^28 bytes of float32 logits).
_PART_ELEMENTS = 2**26


def activations(
    shape: Shape, numerics: Numerics, batch: MicroBatch, distilling: bool = False, hidden_loss: bool = False
) -> Activations:
    """Bytes of one micro-batch; `distilling`: of a student, with or without the loss on hidden states."""
    block = block_bytes(shape, numerics, batch)
    inputs = batch.tokens * shape.hidden * numerics.stream
    blocks = shape.layers * inputs if batch.checkpointing else shape.layers * block
    if not batch.checkpointing and shape.architecture == "modernbert":
        blocks -= _layer_norm(shape, numerics, batch.tokens)  # its first block has no norm before attention
    logits, forward, backward = _logits(shape, numerics, batch, distilling)
    ends, unseen = _ends(shape, numerics, batch)
    return Activations(
        blocks=blocks,
        ends=ends,
        head=_head(shape, numerics, batch) + (8.0 * batch.tokens * shape.hidden if hidden_loss else 0.0),
        logits=logits,
        logits_forward=forward,
        logits_backward=backward,
        window=block - (inputs if _keeps_input(shape, numerics) else 0.0) if batch.checkpointing else 0.0,
        # The step through the feed-forward part: a gradient of size F beside what it is made from, two of the stream.
        block_gradients=batch.tokens * (shape.inner * numerics.matrix + 2.0 * shape.hidden * numerics.stream),
        unseen=unseen,
    )


def block_bytes(shape: Shape, numerics: Numerics, batch: MicroBatch) -> float:
    """Kept by one transformer block without checkpointing, its input included."""
    M, D = batch.tokens, shape.hidden
    readers = 1 if shape.family.fused_qkv else 3
    dropped = shape.family.dropouts_in_block * (shape.hidden_dropout > 0) * M * D
    if shape.architecture == "modernbert":
        dropped = (shape.attention_dropout > 0) * M * D + (shape.inner_dropout > 0) * M * shape.inner
    total = _attention(shape, numerics, batch) + _feed_forward(shape, numerics, M) + dropped * numerics.dropped
    total += _read(numerics, M * D, readers)
    total += _read(numerics, M * D, 2 if shape.architecture == "llama" else 1)
    return total + 2 * _norm(shape, numerics, M)


def _keeps_input(shape: Shape, numerics: Numerics) -> bool:
    """Whether a block keeps its input itself, not only copies of it in another type."""
    if shape.architecture == "llama":  # its norm keeps an fp32 copy
        return numerics.stream == 4
    return shape.family.pre_norm or not numerics.casts


def _read(numerics: Numerics, elements: int, readers: int) -> float:
    """A tensor of the stream's type that `readers` matrix products read: once as it is, or a cast copy for each."""
    return elements * (readers * numerics.matrix if numerics.casts else numerics.stream)


def _norm(shape: Shape, numerics: Numerics, tokens: int) -> float:
    """What a norm keeps of its input; its output is counted where it is read."""
    if shape.architecture != "llama":
        return _layer_norm(shape, numerics, tokens)
    # x in fp32 (pow, and the product with rsqrt), rsqrt, the normalised x that the weight multiplies
    return tokens * (shape.hidden * (4 + numerics.stream) + 4)


def _layer_norm(shape: Shape, numerics: Numerics, tokens: int) -> float:
    return tokens * (shape.hidden * numerics.stream + _STATISTICS)


def _attention(shape: Shape, numerics: Numerics, batch: MicroBatch) -> float:
    """Q, K, V, output and log-sum-exp of a fused kernel; elementary operations keep the scores too."""
    M, Q, K = batch.tokens, shape.queries, shape.keys
    grouped = K != Q and batch.mask_elements > 0  # with a mask, transformers repeats keys and values for each query
    products = Q + 2 * (Q if grouped else K)
    if shape.architecture == "modernbert":
        products += 2 * Q  # rotated Q and K are new; V, a view, holds on to the fused product of all three
    if numerics.kept_scores and shape.attention_dropout > 0:
        # In fp32: Q and K scaled, V, the probabilities, dropout's noise and the dropped probabilities.
        scores = batch.rows * shape.heads * batch.length**2
        return 4 * (M * products + 3 * scores) + M * Q * numerics.matrix
    return M * (products + Q) * numerics.matrix + M * 4 * shape.heads + batch.mask_elements * numerics.matrix


def _feed_forward(shape: Shape, numerics: Numerics, tokens: int) -> float:
    """What lies between the matrices, up to the input of the last."""
    elements = tokens * shape.inner
    if shape.family.gated:  # gate, activation(gate), up, their product
        return elements * 4 * numerics.matrix
    if shape.activation == "gelu_new":  # x of pow, tanh, 1 + tanh; 0.5 x; the product
        return elements * (3 * numerics.power + 2 * numerics.matrix)
    if shape.activation == "relu":  # its output only, which the last matrix reads
        return elements * numerics.matrix
    return elements * 2 * numerics.matrix


def _ends(shape: Shape, numerics: Numerics, batch: MicroBatch) -> tuple[float, float]:
    """Before the first block and after the last; and how much of it no autograd node holds."""
    M, D, family = batch.tokens, shape.hidden, shape.family
    tables = 1 + (shape.position_rows > 0) + (shape.token_types > 0)
    total = float(M * _INDEX * tables)
    if family.embedding_norm:
        total += _layer_norm(shape, numerics, M)
    if shape.embedding_dropout > 0:
        total += M * D * (1 if numerics.dropped == 1 else numerics.stream)
    if family.pre_norm:
        total += _norm(shape, numerics, M)
    unseen = 0.0
    kinds = 2 if shape.architecture == "modernbert" else 1  # full and sliding attention
    if family.rotary:
        rows = batch.rows if batch.isolated else 1
        tables_bytes = kinds * 2 * rows * batch.length * shape.head_size * numerics.stream
        total += tables_bytes
        unseen += tables_bytes * batch.checkpointing
    if batch.checkpointing:
        mask = kinds * float(batch.mask_elements)
        total += mask
        unseen += mask if family.rotary else 0.0  # handed to these blocks by name: checkpoint keeps no name's value
    return total, unseen


def _head(shape: Shape, numerics: Numerics, batch: MicroBatch) -> float:
    """From the last hidden states to the inputs of the output matrix, at target tokens."""
    D, N = shape.hidden, batch.targets
    whole = N * _INDEX
    if batch.cross_entropy == "chunked":  # the parts' inputs, and one part's insides
        whole += N * D * numerics.stream
        N = _at_once(shape, batch)
    if shape.family.causal:
        return whole + _read(numerics, N * D, 1)
    inside = N * D * (numerics.matrix + numerics.odd_norm) + N * _STATISTICS  # of the activation, of the norm
    return whole + 2 * _read(numerics, N * D, 1) + inside


def _logits(shape: Shape, numerics: Numerics, batch: MicroBatch, distilling: bool) -> tuple[float, float, float]:
    """Log-probabilities that autograd keeps, and what is added for a while before and after; fp32.

    Cross entropy: the logits, and their fp32 copy where they are in 16 bits, before; the gradients of log-probabilities
    and of logits together after. Distillation keeps three of that size (student's log-probabilities of the soft and the
    hard loss, teacher's probabilities); while it is computed both models' logits, the teacher's log-probabilities,
    their difference and its product stand beside two of them.
    """
    targets = batch.targets * _INDEX
    if batch.cross_entropy == "liger":  # gradients are made in the forward pass: of the hidden states, of the matrix
        gradients = numerics.matrix * shape.hidden * (batch.targets + shape.vocabulary)
        return targets + gradients, 0.0, 0.0
    kept, forward, backward = (12.0, 2 * numerics.matrix + 8.0, 12.0) if distilling else (4.0, 4.0, 8.0)
    if not distilling and numerics.matrix < 4:
        forward += numerics.matrix
    # In parts, the last part's are kept; one before it is made anew in the backward pass, when the last's are gone.
    elements = float(_at_once(shape, batch) * shape.vocabulary)
    return targets + kept * elements, forward * elements, backward * elements


def _at_once(shape: Shape, batch: MicroBatch) -> int:
    """Targets whose logits are there together: all, or those of one of the equal parts under `chunked`."""
    if batch.cross_entropy != "chunked":
        return batch.targets
    return math.ceil(batch.targets / math.ceil(batch.targets * shape.vocabulary / _PART_ELEMENTS))

"""Bytes that one GPU holds while a model is trained: states by strategy, activations, and the moment of the peak.
How many of each kind of parameter and activation there are is `shapes`' and `activations`' business.

States follow ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054, section 3): with 16-bit weights and gradients and fp32
master weights and two moments, (2 + 2 + K) bytes a parameter, K = 12; stages 1, 2 and 3 divide optimizer state,
gradients and weights by the number of GPUs. ddp and zero0 train fp32 parameters under autocast, fsdp2 gathers its fp32
shards in 16 bits: 4 + 4 + 8 bytes for both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trainer.engine.zero import load_zero
from trainer.planning.activations import MicroBatch, Numerics, Precision, activations
from trainer.planning.case import Case
from trainer.planning.shapes import Shape

_MOMENTS = {"adamw": 2, "lamb": 2, "lion": 1}  # fp32 values that an optimizer keeps for a parameter

# DeepSpeed's defaults (runtime/zero/config.py), in elements.
_REDUCE_BUCKET = 500_000_000
_MAX_LIVE = 1_000_000_000
_SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class Strategy:
    """Who holds what. `stage` as in ZeRO; ddp is 0, fsdp2 shards as 3 does."""

    name: str
    stage: Literal[0, 1, 2, 3]
    deepspeed: bool
    offload_optimizer: str = "none"  # none, cpu, nvme
    offload_parameters: str = "none"
    reduce_bucket: int | None = _REDUCE_BUCKET  # elements; None: DeepSpeed's `auto`, D x D
    overlap: bool = True
    max_live: int = _MAX_LIVE
    sub_group: int = _SUB_GROUP
    secondary_partition: int = 1  # ZeRO++ hpZ: GPUs that share a second copy of the weights
    quantized_weights: bool = False  # ZeRO++ qwZ
    quantized_gradients: bool = False  # ZeRO++ qgZ
    torch_autocast: bool = False  # DeepSpeed's section of that name instead of bf16 or fp16

    @property
    def fsdp(self) -> bool:
        return self.stage == 3 and not self.deepspeed

    def autocast(self, precision: Precision) -> bool:
        """Whether whole parameters are fp32 and autocast makes the 16 bits."""
        return _is_half(precision) and (self.stage == 0 or self.torch_autocast)

    def stored_bytes(self, precision: Precision) -> int:
        """Of a parameter and of a gradient as the optimizer's step finds them."""
        return 2 if _is_half(precision) and not self.fsdp and not self.autocast(precision) else 4

    def gathered_bytes(self, precision: Precision) -> int:
        """Of a parameter as a forward pass finds it."""
        return 2 if _is_half(precision) and not self.autocast(precision) else 4


def _is_half(precision: Precision) -> bool:
    return precision not in ("fp32", "tf32")


def standard_strategies() -> list[Strategy]:
    """What a user chooses between; buckets as `lmworks` ships them in deepspeed_configs."""
    zero = {"deepspeed": True, "reduce_bucket": 50_000_000}
    three = {"deepspeed": True, "reduce_bucket": None}
    return [
        Strategy("ddp / zero0", 0, deepspeed=False),
        Strategy("zero1", 1, **zero),
        Strategy("zero2", 2, **zero),
        Strategy("zero2_offload", 2, **zero, offload_optimizer="cpu"),
        Strategy("zero3", 3, **three),
        Strategy("zero3_offload", 3, **three, offload_optimizer="cpu", offload_parameters="cpu", sub_group=10**8),
        Strategy("fsdp2", 3, deepspeed=False),
    ]


def strategy_of(zero: str) -> Strategy:
    """What a DeepSpeed JSON says: a name in deepspeed_configs/ or a path."""
    tree = load_zero(zero)
    autocast = (tree.get("torch_autocast") or {}).get("enabled") in (True, "auto")
    return replace(_from_section(Path(zero).stem, tree.get("zero_optimization") or {}), torch_autocast=autocast)


def _from_section(name: str, section: Mapping[str, Any]) -> Strategy:
    def number(key: str, default: int) -> int:
        return int(section[key]) if isinstance(section.get(key), int | float) else default

    def device(key: str) -> str:
        return (section.get(key) or {}).get("device", "none")

    bucket = None if section.get("reduce_bucket_size") == "auto" else number("reduce_bucket_size", _REDUCE_BUCKET)
    return Strategy(
        name=name,
        stage=section.get("stage", 0),
        deepspeed=True,
        offload_optimizer=device("offload_optimizer"),
        offload_parameters=device("offload_param"),
        reduce_bucket=bucket,
        overlap=bool(section.get("overlap_comm", True)),
        max_live=number("stage3_max_live_parameters", _MAX_LIVE),
        sub_group=number("sub_group_size", _SUB_GROUP),
        secondary_partition=number("zero_hpz_partition_size", 1),
        quantized_weights=bool(section.get("zero_quantized_weights", False)),
        quantized_gradients=bool(section.get("zero_quantized_gradients", False)),
    )


@dataclass(frozen=True)
class States:
    """Bytes of one GPU that do not depend on the batch, and those it puts elsewhere."""

    weights: float
    gradients: float
    master: float
    moments: float
    update: float  # more of them while the optimizer steps: the shard's gradients in fp32
    host: float  # in the node's memory, for this GPU
    nvme: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.master + self.moments


def states(
    parameters: float,
    gpus: int,
    strategy: Strategy,
    precision: Precision,
    optimizer: str = "adamw",
) -> States:
    """Weights, gradients, master weights and optimizer state of `parameters` on one of `gpus`."""
    size = strategy.stored_bytes(precision)
    shard = parameters / gpus
    # DeepSpeed's sharded optimizers keep an fp32 copy of their shard whatever the parameters are in.
    master = 4.0 * shard if strategy.deepspeed and strategy.stage > 0 else 0.0
    moments = 4.0 * _MOMENTS[optimizer] * (shard if strategy.stage > 0 else parameters)
    weights = size * (shard if strategy.stage == 3 else parameters)
    gradients = size * (shard if strategy.stage >= 2 else parameters)
    update = 4.0 * min(shard, strategy.sub_group if strategy.stage == 3 else shard) if size == 2 else 0.0
    away = {"cpu": 0.0, "nvme": 0.0, "none": 0.0}
    if strategy.offload_optimizer != "none":
        away[strategy.offload_optimizer] += master + moments + 4.0 * shard  # fp32 gradients of the shard go along
        master = moments = gradients = update = 0.0
    if strategy.offload_parameters != "none":
        away[strategy.offload_parameters] += weights
        weights = 0.0
    if strategy.secondary_partition > 1:
        weights += size * parameters / min(gpus, strategy.secondary_partition)
    return States(weights, gradients, master, moments, update, away["cpu"], away["nvme"])


def buffers(shape: Shape, gpus: int, strategy: Strategy, precision: Precision) -> float:
    """What collectives need beside the states: gradient buckets, and weights gathered for use."""
    if gpus == 1 and not strategy.deepspeed:
        return 0.0
    counts = shape.parameters()
    size = strategy.gathered_bytes(precision)
    if strategy.fsdp:
        # The block at work and the one fetched ahead; a block's gradients, and the fp32 copy that is reduced (torch's
        # FSDP2). What is outside the blocks stays gathered from forward to backward.
        outside = counts.total - counts.block_matrices - counts.block_norms
        return counts.largest_block * (3.0 * size + 4.0) + size * outside
    if strategy.stage == 0:
        return 0.0  # gradients are views of DDP's buckets
    bucket = float(shape.hidden**2 if strategy.reduce_bucket is None else strategy.reduce_bucket)
    copies = 2 if strategy.overlap and strategy.stage < 3 else 1  # runtime/zero/stage_1_and_2.py: buf_0, buf_1
    gathered = min(counts.total, strategy.max_live) if strategy.stage == 3 else 0
    return size * (copies * bucket + gathered)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one GPU by part, at the moment when their sum is largest."""

    states: States
    buffers: float
    casts: float  # 16-bit copies of weights that autocast keeps
    activations: float
    logits: float
    update: float
    teacher: float
    moment: Literal["forward", "loss", "backward", "update", "teacher"]

    @property
    def total(self) -> float:
        parts = (self.buffers, self.casts, self.activations, self.logits, self.update, self.teacher)
        return self.states.total + sum(parts)


def footprint(case: Case, gpus: int, strategy: Strategy) -> Footprint:
    """The peak of one GPU: the largest of the moments forward end, loss, block backward, update, teacher's forward."""
    shape, precision, batch = case.shape, case.precision, case.batch
    numerics = Numerics.of(precision, strategy.autocast(precision), case.cuda)
    held = activations(shape, numerics, batch, case.teacher is not None, case.hidden_loss)
    counts = shape.parameters()
    fixed = states(counts.total, gpus, strategy, precision, case.optimizer)
    copies = kept_weight_copies(shape, numerics, batch)
    of_blocks = numerics.matrix * counts.block_matrices if numerics.casts and batch.checkpointing else 0.0
    teacher_weights = _teacher_weights(case, gpus, strategy)
    extra = buffers(shape, gpus, strategy, precision)

    def moment(
        name: Literal["forward", "loss", "backward", "update", "teacher"],
        activation: float,
        logits: float = 0.0,
        casts: float = 0.0,
        update: float = 0.0,
    ) -> Footprint:
        return Footprint(fixed, extra, casts, activation, logits, update, teacher_weights, name)

    inside = held.kept - held.logits
    matrix_gradient = _output_gradient(shape, numerics, batch)
    # The embedding's gradient waits for both of its uses, the first and the last step of the backward pass.
    waiting = counts.embedding * (4.0 if numerics.casts else numerics.matrix) if shape.tied else 0.0
    moments = [
        # autocast lets go of its copies at the end of the forward pass; a recomputed block makes its own anew
        moment("forward", inside, held.logits + held.logits_forward, copies + of_blocks),
        moment("loss", inside, held.logits + max(held.logits_backward, matrix_gradient), copies),
        moment(
            "backward",
            inside - held.head + held.window + held.block_gradients + waiting,
            casts=copies + of_blocks / shape.layers,
        ),
        moment("update", 0.0, update=fixed.update),
        moment("teacher", _teacher_forward(case, numerics)),
    ]
    return max(moments, key=lambda one: one.total)


def largest_micro_batch(case: Case, gpus: int, strategy: Strategy, usable_bytes: float) -> int:
    """Most rows of a micro-batch that fit; 0 if not even one does."""

    def fits(rows: int) -> bool:
        return footprint(case.with_rows(rows), gpus, strategy).total <= usable_bytes

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 2**16:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def kept_weight_copies(shape: Shape, numerics: Numerics, batch: MicroBatch) -> float:
    """Autocast's 16-bit copies of weights that autograd holds, to multiply with them again in the backward pass."""
    counts = shape.parameters()
    kept = counts.cast - (counts.block_matrices if batch.checkpointing else 0)
    return float(numerics.matrix * kept) if numerics.casts else 0.0


def _output_gradient(shape: Shape, numerics: Numerics, batch: MicroBatch) -> float:
    """While the output matrix is differentiated: its new gradient beside the old one, less the log-probabilities that
    are gone by then. Parts add theirs up, so that two are there at once."""
    matrix = float(shape.vocabulary * shape.hidden)
    if numerics.casts:
        gradient = matrix * (numerics.matrix + (8 if batch.cross_entropy == "chunked" else 4))
    else:
        gradient = matrix * numerics.matrix * (2 if batch.cross_entropy == "chunked" else 1)
    gone = batch.targets * shape.vocabulary * (4 - numerics.matrix) if batch.cross_entropy == "full" else 0
    return gradient - gone


def _teacher_weights(case: Case, gpus: int, strategy: Strategy) -> float:
    """The frozen teacher: whole on every GPU or, where weights are cut, its blocks cut and the one at work and the one
    fetched ahead gathered."""
    if case.teacher is None:
        return 0.0
    counts = case.teacher.parameters()
    held = float(counts.total)
    if strategy.stage == 3 and gpus > 1:
        blocks = counts.block_matrices + counts.block_norms
        held += 2 * counts.largest_block - blocks * (1 - 1 / gpus)
    half = case.precision == "bf16" or (case.precision == "fp16" and not strategy.autocast("fp16"))
    return held * (2 if half else 4)


def _teacher_forward(case: Case, numerics: Numerics) -> float:
    """A forward pass without gradients: what a block works on. Its logits are a part of the losses' memory."""
    teacher, batch = case.teacher, case.batch
    if teacher is None:
        return 0.0
    return float(batch.tokens * (3 * numerics.stream * teacher.hidden + 2 * numerics.matrix * teacher.inner))

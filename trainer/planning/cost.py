"""FLOPs, time and communication of a run, in the conventions that published figures use.
How fast a GPU is at best is `hardware`'s table; what share of it is reached (MFU) is the caller's assumption."""

from dataclasses import dataclass

from trainer.planning.activations import Precision
from trainer.planning.hardware import GPUS_PER_NODE, LINK_EFFICIENCY, Gpu
from trainer.planning.memory import Strategy
from trainer.planning.shapes import Shape

# Middle of what well-tuned systems publish for H100s: llm-foundry 40-46 % (1B to 7B, scripts/train/benchmarking), and
# Megatron-Core 41-49 % (1.7B to 462B, README). Small models and slow networks stay below it.
DEFAULT_MFU = 0.4


def flops_per_token(shape: Shape, length: int, target_share: float = 1.0) -> float:
    """Of forward and backward: 6 N + 12 L D T (PaLM, arXiv:2204.02311, appendix B), as `models.train_flops` counts.

    Attention is counted in full also for causal models, recomputation not at all, the output matrix at the share of
    tokens that are targets. Published figures count it at all of them.
    """
    counts = shape.parameters()
    elsewhere = 6.0 * (counts.multiplying - counts.embedding) + 12.0 * shape.layers * shape.hidden * length
    return elsewhere + target_share * 6.0 * counts.embedding


def recomputed_flops_per_token(shape: Shape, length: int) -> float:
    """What gradient checkpointing adds: the forward pass of the blocks once more."""
    counts = shape.parameters()
    return 2.0 * (counts.block_matrices + counts.block_norms) + 4.0 * shape.layers * shape.hidden * length


def forward_flops_per_token(shape: Shape, length: int, target_share: float) -> float:
    """A teacher's share: a third of training."""
    return flops_per_token(shape, length, target_share) / 3


@dataclass(frozen=True)
class Traffic:
    """Bytes that pass one GPU's links in an optimizer step, and the time they take if nothing hides them."""

    node_bytes: float  # between the GPUs of a node only
    ring_bytes: float  # around all GPUs
    seconds: float


def traffic(
    parameters: float, gpus: int, strategy: Strategy, precision: Precision, accumulation: int, gpu: Gpu
) -> Traffic:
    """Ring collectives (ZeRO, arXiv:1910.02054, section 7): an all-gather or a reduce-scatter of S bytes moves
    S (n - 1) / n past each of n GPUs, an all-reduce twice that.

    ddp and stage 1 exchange gradients once a step; stage 2 reduces them, and stage 3 and fsdp2 (its gradients in fp32)
    gather weights twice and reduce gradients, in every micro-batch. ZeRO++ (arXiv:2306.10209): weights in 8 bits,
    gathered inside a node for the backward pass, gradients in 4 bits.
    """
    psi = parameters * strategy.gathered_bytes(precision)
    weights = psi * (0.5 if strategy.quantized_weights else 1.0)
    gradients = parameters * strategy.stored_bytes(precision) * (0.25 if strategy.quantized_gradients else 1.0)
    inside = 0.0
    if strategy.stage < 2:
        around = gradients + weights  # stage 0: the two halves of an all-reduce
    elif strategy.stage == 2:
        around = accumulation * gradients + weights
    elif strategy.secondary_partition > 1:
        around = accumulation * (weights + gradients)
        inside = accumulation * psi
    else:
        around = accumulation * (2 * weights + gradients)
    ring = around * (gpus - 1) / gpus
    members = min(gpus, strategy.secondary_partition, GPUS_PER_NODE)
    node = inside * (members - 1) / members
    seconds = ring / (gpu.bandwidth_gb_s(gpus) * 1e9) + node / (gpu.link_gb_s * LINK_EFFICIENCY * 1e9)
    return Traffic(node, ring, seconds)


def step_seconds(flops: float, gpus: int, gpu: Gpu, precision: Precision, mfu: float) -> float:
    """Time of `flops` on all GPUs at a share `mfu` of their datasheet peak."""
    return flops / (gpus * gpu.peak_flops(precision) * mfu)

"""What of a training stage decides about its memory on a given GPU, with `auto` resolved as training would.
The bytes themselves are `memory`'s business."""

from dataclasses import dataclass, replace

from trainer.config import Distill
from trainer.planning.activations import CrossEntropy, MicroBatch, Precision
from trainer.planning.hardware import Gpu
from trainer.planning.shapes import Shape
from trainer.planning.workload import Workload

# trainer/heads.py: `cross_entropy: auto` makes all logits at once up to this share of the device's memory.
_WHOLE_LOGITS_SHARE = 1 / 16


@dataclass(frozen=True)
class Case:
    """One micro-batch of one model in one precision."""

    shape: Shape
    precision: Precision
    optimizer: str
    batch: MicroBatch
    teacher: Shape | None = None
    hidden_loss: bool = False  # distillation: teacher's and student's hidden states are compared
    cuda: bool = True

    def with_rows(self, rows: int) -> "Case":
        """The same with another micro-batch size."""
        targets = round(self.batch.targets * rows / self.batch.rows)
        return replace(self, batch=replace(self.batch, rows=rows, targets=targets))

    def with_checkpointing(self, on: bool) -> "Case":
        """The same with or without gradient checkpointing."""
        return replace(self, batch=replace(self.batch, checkpointing=on))


def case_of(workload: Workload, gpu: Gpu) -> tuple[Case, tuple[str, ...]]:
    """The stage's case on `gpu`, and what was taken for `auto` or cannot be counted."""
    training, notes = workload.training, []
    case = plain_case(workload, cuda=True)
    batch = case.batch
    if batch.isolated and not _needs_mask(workload, gpu):
        batch = replace(batch, dense_mask=False)
    if batch.isolated and training.attention == "auto":
        notes.append(f"attention auto: counted {'with a dense mask (sdpa)' if batch.dense_mask else 'without a mask'}")
    cross_entropy, note = _cross_entropy(workload, batch, gpu)
    if training.compile:
        notes.append("compile: torch.compile keeps fewer activations than are counted here")
    if training.precision == "fp8":
        notes.append("precision fp8: memory and peak are counted as for bf16")
    return replace(case, batch=replace(batch, cross_entropy=cross_entropy)), (*notes, *note)


def plain_case(workload: Workload, cuda: bool) -> Case:
    """The stage with SDPA attention and all logits at once."""
    training, length = workload.training, workload.data.sequence_length
    batch = MicroBatch(
        rows=training.micro_batch_size,
        length=length,
        targets=round(training.micro_batch_size * length * workload.target_share),
        isolated=workload.data.packing == "isolate",
        checkpointing=training.gradient_checkpointing,
    )
    hidden_loss = isinstance(training, Distill) and training.weights.hidden > 0
    return Case(
        shape=workload.shape,
        precision=training.precision,
        optimizer=training.optim.name,
        batch=batch,
        teacher=workload.teacher,
        hidden_loss=hidden_loss,
        cuda=cuda,
    )


def _cross_entropy(workload: Workload, batch: MicroBatch, gpu: Gpu) -> tuple[CrossEntropy, tuple[str, ...]]:
    wanted = workload.training.cross_entropy
    if wanted != "auto":
        return wanted, ()
    logits = 4.0 * batch.targets * workload.shape.vocabulary * (2 if workload.teacher else 1)
    taken: CrossEntropy = "chunked" if logits > gpu.memory_gb * 1e9 * _WHOLE_LOGITS_SHARE else "full"
    return taken, (f"cross_entropy auto: counted as {taken} ({logits / 2**30:.2g} GiB of fp32 logits in all)",)


def _needs_mask(workload: Workload, gpu: Gpu) -> bool:
    """Whether the kernel keeps documents apart by a mask tensor (trainer/attention.py): SDPA does; auto takes a kernel
    without on a GPU since the A100, in 16 bits, for attention without dropout."""
    wanted = workload.training.attention
    if wanted != "auto":
        return wanted == "sdpa"
    half = workload.training.precision in ("bf16", "fp16", "fp8")
    return gpu.name == "v100" or not half or workload.shape.attention_dropout > 0

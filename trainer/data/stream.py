"""Which rows an optimizer step sees, on which rank, in which micro-batch: a pure function of (seed, step).
The whole state of the stream is therefore the step; any number of ranks sees the same rows in the same steps.

Shapes: B rows in a micro-batch, T tokens in a row, N target tokens and P documents in a micro-batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from trainer.config import nearest_multiples
from trainer.data.masking import Masking
from trainer.data.packing import NO_TARGET, Row, Rows
from trainer.errors import UserError

VALIDATION_EPOCH = 2**31  # no training epoch comes this far: validation draws its masks apart from training
# Rows that are made at once: for fewer, more of the time goes to calling numpy than to what it does.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `isolated` says whether rows hold documents that must not see each other."""

    input_ids: Tensor  # [B, T]
    segments: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    boundaries: Tensor  # [P + 1] int32: where documents begin in the rows one after the other, and B * T
    longest: int  # tokens of the longest document
    target_places: Tensor  # [N] index into the flattened [B * T]
    targets: Tensor  # [N]
    sample_ids: tuple[int, ...]  # position in the run's endless sequence of rows
    num_tokens: int  # tokens that are not padding
    isolated: bool

    @property
    def num_targets(self) -> int:
        return len(self.targets)

    def without_targets(self) -> "Batch":
        """The same rows, counting for nothing."""
        return dataclasses.replace(
            self,
            target_places=self.target_places[:0],
            targets=self.targets[:0],
            num_tokens=0,
            segments=self.segments * 0,
        )

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        if self.input_ids.device.type == device.type:
            return self
        moved = {
            name: getattr(self, name).pin_memory().to(device, non_blocking=True)
            for name in ("input_ids", "segments", "positions", "boundaries", "target_places", "targets")
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class BatchPlan:
    """How a step's `global_batch_size` rows fall to ranks and micro-batches."""

    global_batch_size: int
    micro_batch_size: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        at_once = self.micro_batch_size * self.world
        if self.global_batch_size % at_once:
            raise UserError(
                f"global_batch_size {self.global_batch_size} does not divide over {self.world} rank(s) x "
                f"micro_batch_size {self.micro_batch_size}",
                f"a multiple of {at_once}; nearest: {nearest_multiples(self.global_batch_size, at_once)}",
                "change global_batch_size, micro_batch_size or the number of ranks",
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches that one rank runs in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.world)

    def samples(self, step: int, micro: int) -> range:
        """Samples of micro-batch `micro` of this rank in `step` (both from 0)."""
        first = step * self.global_batch_size + (micro * self.world + self.rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


class TrainStream:
    """Endless rows in shuffled order; batches can be made ahead, and brought to `device`."""

    def __init__(
        self,
        rows: Rows,
        masking: Masking | None,
        plan: BatchPlan,
        seed: int,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    ) -> None:
        if not len(rows):
            raise UserError("the training split fills not one row", "more text or a shorter sequence_length")
        self.plan = plan
        self._rows = rows
        self._masking = masking
        self._seed = seed
        self._device = device
        self._made: dict[int, list[Batch]] = {}

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step` (from 0)."""
        self.make_ahead(step)
        return self._made.pop(step)

    def make_ahead(self, step: int) -> None:
        """Make the batches of `step` where they are not there; those of later steps with them, if all are small."""
        if step in self._made:
            return
        own_rows = self.plan.micro_batch_size * self.plan.accumulation
        steps = range(step, step + max(1, _ROWS_AT_ONCE // own_rows))
        batches = self._make(
            [self.plan.samples(one, micro) for one in steps for micro in range(self.plan.accumulation)]
        )
        self._made = {one: list(islice(batches, self.plan.accumulation)) for one in steps}

    @property
    def epoch_steps(self) -> float:
        """Steps in which every row is seen once."""
        return len(self._rows) / self.plan.global_batch_size

    def _make(self, micro_batches: list[range]) -> Iterator[Batch]:
        """The batches of these samples."""
        at_once = max(1, _ROWS_AT_ONCE // self.plan.micro_batch_size)
        for first in range(0, len(micro_batches), at_once):
            chosen = micro_batches[first : first + at_once]
            places = [divmod(sample, len(self._rows)) for samples in chosen for sample in samples]
            indices = [int(_order(self._seed, epoch, len(self._rows))[place]) for epoch, place in places]
            read = _read(self._rows, self._masking, indices, [epoch for epoch, _ in places])
            for number, samples in enumerate(chosen):
                own = slice(number * len(samples), (number + 1) * len(samples))
                yield _batch(read.part(own), tuple(samples), self._rows.isolated).to(self._device)


def validation_batches(
    rows: Rows, masking: Masking | None, plan: BatchPlan, count: int | None, seed: int
) -> Callable[[], Iterator[Batch]]:
    """A function that yields this rank's share of `count` validation rows (None: all), the same rows at each call.

    All ranks get the same number of batches, for a forward pass may be a collective; what is short is filled up with
    a batch that has no targets.
    """
    if not len(rows):
        raise UserError("the validation split fills not one row", "more validation text or a shorter sequence_length")
    order = _order(seed, VALIDATION_EPOCH, len(rows))[: count or len(rows)]
    groups = [order[at : at + plan.micro_batch_size] for at in range(0, len(order), plan.micro_batch_size)]

    def batches() -> Iterator[Batch]:
        for first in range(0, len(groups), plan.world):
            at = first + plan.rank
            chosen = groups[at] if at < len(groups) else groups[0][:1]
            indices = tuple(map(int, chosen))
            read = _read(rows, masking, indices, [VALIDATION_EPOCH] * len(indices))
            batch = _batch(read, indices, rows.isolated)
            yield batch if at < len(groups) else batch.without_targets()

    return batches


@functools.lru_cache(maxsize=3)  # two training epochs meet in one batch, and validation has its own
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, 0x0DE2, epoch]).permutation(count)


def _read(rows: Rows, masking: Masking | None, indices: Sequence[int], epochs: Sequence[int]) -> Row:
    """Some rows, each in its epoch, as one; masked, if they are for a masked LM."""
    read = Row.stack([rows.row(index, epoch) for index, epoch in zip(indices, epochs, strict=True)])
    return masking.apply(read, indices, epochs) if masking else read


def _batch(rows: Row, samples: tuple[int, ...], isolated: bool) -> Batch:
    targets = rows.targets.reshape(-1)
    places = np.flatnonzero(targets != NO_TARGET)
    boundaries = _boundaries(rows.segments)
    return Batch(
        input_ids=torch.from_numpy(rows.input_ids),
        segments=torch.from_numpy(rows.segments),
        positions=torch.from_numpy(rows.positions),
        boundaries=torch.from_numpy(boundaries),
        longest=int(np.diff(boundaries).max()),
        target_places=torch.from_numpy(places),
        targets=torch.from_numpy(targets[places]),
        sample_ids=samples,
        num_tokens=int(np.count_nonzero(rows.segments)),
        isolated=isolated,
    )


def _boundaries(segments: np.ndarray) -> np.ndarray:
    """Where a document begins in rows [B, T] one after the other, and where the last ends; padding counts as one."""
    begins = np.ones(segments.shape, dtype=np.bool_)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return np.append(np.flatnonzero(begins), segments.size).astype(np.int32)

"""Watches the steps of a run: gradients that are not finite, and a loss that spikes.
Every number it sees is global, so that all ranks decide alike; going back and saving are the loop's."""

import math
import statistics
from collections import deque
from collections.abc import Callable

from torch import Tensor

from trainer.config import Training
from trainer.engine.strategy import StepResult
from trainer.errors import UserError

# Below this fp16's loss scale has found no scale at which gradients are finite (a GradScaler begins at 65,536).
_SMALLEST_LOSS_SCALE = 1.0


class Trouble:
    """Raises once a run cannot be trusted to go on; `total` sums a number over ranks."""

    def __init__(self, training: Training, total: Callable[[list[float]], list[float]]) -> None:
        self._training = training
        self._total = total
        self._bad: list[tuple[int, tuple[int, int]]] = []
        self._losses: deque[float] = deque(maxlen=training.loss_spike.window_steps if training.loss_spike else 1)

    def spiked(
        self, step: int, share: Tensor, result: StepResult, loss_scale: float | None, samples: tuple[int, int]
    ) -> bool:
        """Look at a step: this rank's share of its loss, what the optimizer made of it, and the samples it saw.

        Returns whether its loss was a spike, if the recipe has a `loss_spike`. Raises UserError after `max_bad_steps`
        in a row that were not applied. In fp16 a skipped step is how the loss scale finds its size, and counts only
        once the scale cannot fall further.
        """
        at_work = loss_scale is not None and loss_scale > _SMALLEST_LOSS_SCALE
        self._bad = [] if result.applied or at_work else [*self._bad, (step, samples)]
        if len(self._bad) >= self._training.max_bad_steps:
            where = "; ".join(f"step {at}: samples {first} to {last}" for at, (first, last) in self._bad)
            raise UserError(
                f"gradients not finite in {len(self._bad)} steps in a row ({where})",
                "finite numbers; those steps were left out, and the last checkpoint is intact",
                "lower optim.learning_rate, set max_grad_norm, or look at those samples, and run again",
            )
        return result.applied and self._training.loss_spike is not None and self._is_spike(step, float(share))

    def _is_spike(self, step: int, share: float) -> bool:
        spike = self._training.loss_spike
        assert spike is not None
        (loss,) = self._total([share])
        full = len(self._losses) == self._losses.maxlen
        if not (full and loss > spike.factor * statistics.median(self._losses)) and math.isfinite(loss):
            self._losses.append(loss)
            return False
        self._losses.clear()
        return True

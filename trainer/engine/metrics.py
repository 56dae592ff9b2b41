"""What a run reports about itself: one JSON object a line, TensorBoard, and one progress bar on rank 0.
Numbers are global, over all ranks; their arithmetic is in the loop and the objectives."""

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from trainer.engine.engine import Engine
from trainer.engine.strategy import StepResult
from trainer.errors import DISK_FULL
from trainer.models import TrainFlops
from trainer.objectives.loss import LossSum


class Meter:
    """Sums of the loss terms since the last report; they stay on the device until someone asks."""

    def __init__(self, engine: Engine, flops: TrainFlops, peak_flops: float | None) -> None:
        self._engine = engine
        self._flops = flops
        self._peak_flops = peak_flops
        self.forward_watch = Stopwatch(engine.device)
        self.clear()

    def clear(self) -> None:
        """Forget the steps since the last report."""
        self.forward_watch.seconds()
        self._sums: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._weights: dict[str, tuple[float, str]] = {}
        self._counts = {"targets": 0.0, "tokens": 0.0}
        self._steps = 0
        self._norm = math.nan
        self._waited_s = self._paused_s = 0.0
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what stops the loop until the data code has a step's batches."""
        began = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training: evaluation, saving. It counts for no step's time."""
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began

    def add(self, loss: LossSum) -> None:
        """Take in one micro-batch of this rank."""
        for name, term in loss.terms.items():
            self._weights[name] = (term.weight, term.per)
            self._accumulate(name, term.total.detach())
        for name, total in loss.reported.items():
            self._weights[name] = (0.0, "targets")
            self._accumulate(name, total)

    def _accumulate(self, name: str, value: Tensor) -> None:
        self._pending[name] = self._pending[name] + value if name in self._pending else value

    def step(self, counts: dict[str, float], result: StepResult) -> None:
        """Take in the end of an optimizer step and its global counts; the losses of a skipped one count for nothing."""
        self._steps += 1
        self._norm = result.grad_norm
        pending, self._pending = self._pending, {}
        if not result.applied and self._sums:
            return
        for name, count in counts.items():
            self._counts[name] += count
        for name, value in pending.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def flush(self) -> dict[str, float | None]:
        """Global means over the steps since the last call. A collective: every rank calls it."""
        names = list(self._sums)
        local = torch.stack([self._sums[name].float() for name in names]).tolist()  # waits for the device
        seconds = time.perf_counter() - self._began - self._paused_s
        *sums, waited_s = self._engine.ranks.sum([*local, self._waited_s], "adding up the losses")
        totals = dict(zip(names, sums, strict=True))
        means = {name: total / self._counts[self._weights[name][1]] for name, total in totals.items()}
        terms = [name for name in names if self._weights[name][0]]
        row: dict[str, float | None] = {"loss": sum(self._weights[name][0] * means[name] for name in terms)}
        row |= {f"loss_{name}": means[name] for name in terms if name != "loss"}
        row |= {name: means[name] for name in names if name not in terms}
        row["grad_norm_before_clip"] = self._norm
        row |= self._speed(seconds) | self._stragglers()
        row["data_wait_share"] = waited_s / self._engine.world / seconds
        if (scale := self._engine.loss_scale()) is not None:
            row["loss_scale"] = scale
        self.clear()
        return row

    def _stragglers(self) -> dict[str, float | None]:
        """Who is slowest. The time of forward passes tells it: the rest of a step, each rank waits for all."""
        seconds = self._engine.ranks.gather(self.forward_watch.seconds())
        if len(seconds) == 1:
            return {}
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        return {"slowest_rank": slowest, "slowest_to_median": seconds[slowest] / statistics.median(seconds)}

    def _speed(self, seconds: float) -> dict[str, float | None]:
        tokens_per_s = self._counts["tokens"] / seconds
        mfu = None
        if self._peak_flops is not None:
            done = self._flops.of(self._counts["tokens"], self._counts["targets"])
            mfu = done / seconds / (self._peak_flops * self._engine.world)
        return {
            "step_time_s": seconds / self._steps,
            "tokens_per_s": tokens_per_s,
            "mfu": mfu,
            "peak_memory_gib": self._engine.peak_memory_gib(),
        }

    def has_steps(self) -> bool:
        """Whether steps were taken since the last flush."""
        return self._steps > 0


class Stopwatch:
    """Adds up the time between entering and leaving, on a GPU the GPU's own, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._on_gpu:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            self._events.append(pair)
        self._began = time.perf_counter()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        self._seconds += time.perf_counter() - self._began

    def seconds(self) -> float:
        """The sum so far, which is begun anew. On a GPU, waits for what was measured."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds = sum(began.elapsed_time(ended) for began, ended in self._events) / 1e3
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


class Log:
    """metrics.jsonl, TensorBoard and the progress bar of one stage; silent on every rank but the main one."""

    def __init__(self, folder: Path, title: str, max_steps: int, is_main: bool) -> None:
        self._is_main = is_main
        self.console = Console(stderr=True, quiet=not is_main)
        self._bar: Progress | None = None
        if not is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "metrics.jsonl").open("ab", buffering=0)
        self._waiting = b""  # lines that a full disk did not take
        self._board: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"))
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn(title),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[now]}"),
                console=self.console,
            )
            self._task = self._bar.add_task(title, total=max_steps, now="")

    def __enter__(self) -> "Log":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        if self._is_main:
            self._append("")
            if self._waiting:
                self.say("metrics.jsonl lacks its last lines: the disk is still full")
            self._file.close()
            self._on_board(lambda board: board.close())

    def say(self, text: str) -> None:
        """A line for the user."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def event(self, event: str, step: int, **values: Any) -> None:
        """Append one object to metrics.jsonl and its numbers to TensorBoard."""
        if not self._is_main:
            return
        row = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._append(json.dumps({"event": event, "step": step, **row}, allow_nan=False) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._on_board(lambda board, name=name, value=value: board.add_scalar(f"{event}/{name}", value, step))

    def _append(self, line: str) -> None:
        """Write whole lines, at once; what a full disk does not take waits for the next one."""
        said = bool(self._waiting)
        self._waiting += line.encode()
        rest, file = self._waiting, self._file.fileno()
        size = os.fstat(file).st_size
        try:
            while rest:
                rest = rest[os.write(file, rest) :]
            self._waiting = b""
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            os.ftruncate(file, size)
            if not said:
                self.say(f"metrics.jsonl: {error.strerror}; its lines wait in memory until there is room")

    def _on_board(self, write: Callable[[SummaryWriter], object]) -> None:
        """TensorBoard's writer has a thread that dies at a full disk, and raises that error from then on."""
        if self._board is None:
            return
        try:
            write(self._board)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self._board = None
            self.say(f"TensorBoard: {error.strerror}; this run writes no further points for it")

    def progress(self, step: int, row: dict[str, Any]) -> None:
        """Move the bar."""
        if self._bar:
            now = f"loss {row['loss']:.3f}  {row['tokens_per_s']:,.0f} tokens/s"
            self._bar.update(self._task, completed=step, now=now)

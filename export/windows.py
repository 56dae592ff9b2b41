"""Times a call in windows until the figures agree, counting only windows in which the process had the CPU.
What is called, and what the figures are compared with, is the caller's business; the clock can be replaced.
"""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

# A window in which the process got less of the CPU time that it wanted is not counted. Seen here: at half the CPU
# medians double, and PyTorch's OpenMP barriers make them ten times as long.
MIN_CPU_SHARE = 0.85
_AGREEING = 3
_MIN_CALLS = 3
_WARM_UP_CALLS = 3
_PAUSE_AFTER_CONTENTION_S = 0.2


class Clock(Protocol):
    """Wall time, and what the process's threads got and missed of the CPU, all in seconds since any fixed moment."""

    def wall_s(self) -> float: ...

    def cpu_s(self) -> float: ...

    def queued_s(self) -> float | None: ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The clocks of this process."""

    def wall_s(self) -> float:
        return time.perf_counter()

    def cpu_s(self) -> float:
        return time.process_time()

    def queued_s(self) -> float | None:
        """Time that threads of this process were ready to run but had no CPU; None where Linux does not tell."""
        scheduled = scheduled_s("self")
        return None if scheduled is None else scheduled[1]

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def scheduled_s(process: int | str) -> tuple[float, float] | None:
    """Seconds that a process's threads ran, and that they were ready to run but had no CPU; None where Linux does not
    tell.

    Source: first two fields of /proc/<pid>/task/<tid>/schedstat (Documentation/scheduler/sched-stats.rst).
    """
    folder = Path("/proc", str(process))
    if not (folder / "schedstat").is_file():
        return None
    ran_ns = queued_ns = 0
    for thread in os.listdir(folder / "task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended just now
            ran, queued, _ = (folder / "task" / thread / "schedstat").read_text().split()
            ran_ns, queued_ns = ran_ns + int(ran), queued_ns + int(queued)
    return ran_ns / 1e9, queued_ns / 1e9


def cpu_share(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    """What a process's threads got of the CPU time that they wanted between two `scheduled_s`; None where not known."""
    if before is None or after is None:
        return None
    ran_s, queued_s = after[0] - before[0], max(0.0, after[1] - before[1])
    return ran_s / (ran_s + queued_s) if ran_s + queued_s > 0 else 1.0


@dataclass(frozen=True)
class Window:
    """One measured stretch: duration of each call, and the share of the CPU time wanted that the process got."""

    calls_s: tuple[float, ...]
    cpu_share: float

    @property
    def median_s(self) -> float:
        return float(np.median(self.calls_s))


@dataclass(frozen=True)
class Settings:
    threads: int
    window_s: float
    max_windows: int
    stability: float


@dataclass(frozen=True)
class Measurement:
    """Outcome of measuring one call: stable with figures of the last windows, or unstable with the reason."""

    stable: bool
    reason: str
    windows: tuple[Window, ...]
    contended: int
    lowest_share: float

    @property
    def calls_s(self) -> np.ndarray:
        """Durations of all calls in the last windows that counted; empty if fewer than it takes to agree did."""
        last = self.windows[-_AGREEING:] if len(self.windows) >= _AGREEING else ()
        return np.concatenate([np.empty(0), *(window.calls_s for window in last)])


def measure(call: Callable[[], object], settings: Settings, clock: Clock) -> Measurement:
    """Warm up, then take windows until the medians of the last three lie within `stability` of each other.

    Contended windows do not count. After `max_windows` of either kind the measurement is unstable.
    """
    started = clock.wall_s()
    calls = 0
    while calls < _WARM_UP_CALLS or clock.wall_s() - started < settings.window_s:
        call()
        calls += 1
    counted: list[Window] = []
    shares = []
    while len(counted) < settings.max_windows and len(shares) - len(counted) < settings.max_windows:
        window = take_window(call, settings, clock)
        shares.append(window.cpu_share)
        if window.cpu_share < MIN_CPU_SHARE:
            clock.sleep(_PAUSE_AFTER_CONTENTION_S)
            continue
        counted.append(window)
        if len(counted) >= _AGREEING and spread(counted[-_AGREEING:]) <= settings.stability:
            lowest = min(agreeing.cpu_share for agreeing in counted[-_AGREEING:])
            return Measurement(True, "", tuple(counted), len(shares) - len(counted), lowest)
    contended = len(shares) - len(counted)
    if contended >= settings.max_windows:
        reason = f"others used the CPU: {contended} of {len(shares)} windows got under {MIN_CPU_SHARE:.0%} of it"
    else:
        last = spread(counted[-_AGREEING:])
        reason = f"medians of the last {_AGREEING} of {len(counted)} windows differ by {last:.0%}"
    return Measurement(False, reason, tuple(counted), contended, min(shares))


def take_window(call: Callable[[], object], settings: Settings, clock: Clock) -> Window:
    """Call again and again for `window_s`, at least three times."""
    calls_s: list[float] = []
    cpu_s, queued_s, started = clock.cpu_s(), clock.queued_s(), clock.wall_s()
    now = started
    while len(calls_s) < _MIN_CALLS or now - started < settings.window_s:
        before = now
        call()
        now = clock.wall_s()
        calls_s.append(now - before)
    got_s, queued_after_s = clock.cpu_s() - cpu_s, clock.queued_s()
    if queued_s is None or queued_after_s is None:
        wanted_s = (now - started) * settings.threads
    else:  # threads that were idle by themselves wanted nothing: small models leave some idle
        wanted_s = got_s + max(0.0, queued_after_s - queued_s)
    return Window(tuple(calls_s), got_s / wanted_s if wanted_s > 0 else 1.0)


def spread(windows: list[Window]) -> float:
    """Largest minus smallest median, relative to the middle one."""
    medians = sorted(window.median_s for window in windows)
    return (medians[-1] - medians[0]) / medians[len(medians) // 2]

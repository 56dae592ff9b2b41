"""Measuring windows on a fake clock: warm-up is excluded, unstable and contended windows never become figures."""

import os
import threading
import time

import numpy as np
import pytest

from export.windows import MIN_CPU_SHARE, Settings, SystemClock, measure, spread, take_window

SETTINGS = Settings(threads=2, window_s=1.0, max_windows=6, stability=0.1)


class FakeMachine:
    """Calls take the durations that `duration_s(wall)` says; their threads wait for a CPU as `queued(wall)` says."""

    def __init__(self, duration_s, queued=lambda wall: 0.0, tells_queue=True):
        self.now, self.cpu, self.queue, self.slept = 0.0, 0.0, 0.0, 0
        self.duration_s, self.queued, self.tells_queue = duration_s, queued, tells_queue

    def call(self):
        duration, queued = self.duration_s(self.now), self.queued(self.now)
        self.now += duration
        self.cpu += 2 * duration - queued
        self.queue += queued

    def wall_s(self):
        return self.now

    def cpu_s(self):
        return self.cpu

    def queued_s(self):
        return self.queue if self.tells_queue else None

    def sleep(self, seconds):
        self.now += seconds
        self.slept += 1


def test_warm_up_is_excluded():
    machine = FakeMachine(lambda wall: 0.9 if wall < 1.0 else 0.01)
    found = measure(machine.call, SETTINGS, machine)
    assert found.stable
    assert found.calls_s.max() == pytest.approx(0.01)
    assert len(found.windows) == 3


def test_first_windows_that_differ_are_dropped():
    machine = FakeMachine(lambda wall: 0.02 if wall < 3.0 else 0.01)
    found = measure(machine.call, SETTINGS, machine)
    assert found.stable
    assert len(found.windows) == 5
    assert found.calls_s.max() == pytest.approx(0.01)


def test_medians_that_never_agree_are_unstable():
    machine = FakeMachine(lambda wall: 0.01 * (1 + int(wall)))
    found = measure(machine.call, SETTINGS, machine)
    assert not found.stable
    assert len(found.windows) == SETTINGS.max_windows
    assert "medians of the last 3 of 6 windows differ by" in found.reason


def test_contended_windows_do_not_count():
    """While others use the CPU calls take twice as long; the figures are those of the quiet time after."""
    machine = FakeMachine(lambda wall: 0.02 if wall < 4.0 else 0.01, lambda wall: 0.02 if wall < 4.0 else 0.0)
    found = measure(machine.call, SETTINGS, machine)
    assert found.stable
    assert found.contended == machine.slept > 0
    assert found.calls_s.max() == pytest.approx(0.01)
    assert found.lowest_share == 1.0


def test_a_machine_that_is_always_busy_gives_no_figure():
    machine = FakeMachine(lambda wall: 0.01, lambda wall: 0.02 * (1 - MIN_CPU_SHARE) + 0.001)
    found = measure(machine.call, SETTINGS, machine)
    assert not found.stable
    assert found.windows == ()
    assert found.contended == SETTINGS.max_windows
    assert found.reason.startswith("others used the CPU: 6 of 6 windows")


def test_without_the_queue_the_threads_count():
    """Where the system does not tell waiting time, the share is of all the threads' time."""
    machine = FakeMachine(lambda wall: 0.01, lambda wall: 0.008, tells_queue=False)
    assert take_window(machine.call, SETTINGS, machine).cpu_share == pytest.approx(0.6)


def test_idle_threads_are_no_contention():
    machine = FakeMachine(lambda wall: 0.01)
    machine.call = lambda: (setattr(machine, "now", machine.now + 0.01), setattr(machine, "cpu", machine.cpu + 0.01))
    assert take_window(machine.call, SETTINGS, machine).cpu_share == 1.0


def test_spread_is_relative_to_the_middle():
    windows = [
        take_window(machine.call, SETTINGS, machine) for machine in (FakeMachine(lambda w, s=s: s) for s in (1, 2, 4))
    ]
    assert spread(windows) == pytest.approx(1.5)


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="this system does not tell waiting time")
def test_the_system_clock_sees_waiting_threads():
    """More busy threads than CPUs: some of them must wait, and the clock says so."""
    clock, stop = SystemClock(), threading.Event()

    def burn():
        matrix = np.ones((300, 300))
        while not stop.is_set():
            matrix @ matrix  # numpy lets go of the interpreter's lock here

    threads = [threading.Thread(target=burn) for _ in range(4 * (os.cpu_count() or 1))]
    before_queue, before_cpu = clock.queued_s(), clock.cpu_s()
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    waited, used = clock.queued_s() - before_queue, clock.cpu_s() - before_cpu
    stop.set()
    for thread in threads:
        thread.join()
    assert used > 0
    assert waited > 0

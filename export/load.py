"""Open-loop load: requests arrive by a clock of their own, and what each waited is counted from when it was due.
The process that answers them is `load_worker`'s; which models, and where the figures go, `bench`'s.

A client that waits for an answer before it asks again leaves out just the requests that would have waited longest
(G. Tene's "coordinated omission"). Here a late answer delays no later request, and one that cannot even be sent in time
counts from its due time all the same.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.bench_inputs import draw_documents
from export.load_worker import Service
from export.runners import process_environment
from export.windows import MIN_CPU_SHARE, cpu_share, scheduled_s
from trainer.artifact import write_json
from trainer.errors import UserError
from trainer.export_config import Load

_REQUESTS = 256  # different ones, taken in turn
_FEWEST = 100  # requests for a 99th percentile that is more than the slowest one
_STEPS = 5  # of the search: it ends within 1/32 of what the server can do at the most
_LONGEST = 6  # times `seconds` that one rate may take to send `_FEWEST`
_LEAD_S = 0.05  # between making a schedule and its first arrival


@dataclass
class Server:
    """A running load_worker, and when it answered what. `answered`: request to its time (monotonic) and batch size."""

    process: subprocess.Popen[str]
    rows: int
    sent: int = 0
    answered: dict[int, tuple[float, int]] = field(default_factory=dict)

    def send(self) -> int:
        """Send one request; its number."""
        number, self.sent = self.sent, self.sent + 1
        self._write(f"{number} {number % self.rows}\n")
        return number

    def drop(self) -> None:
        """Forget all requests that wait."""
        self._write("drop\n")

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise UserError(
                "the server ended under load", "one that goes on", "see whether it has the memory"
            ) from None

    def listen(self) -> None:
        """Note answers until the server ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            number, batch = line.split()
            self.answered[int(number)] = (time.monotonic(), int(batch))


@contextmanager
def serving(service: Service, rows: int, path: Path) -> Iterator[Server]:
    """A server that is ready; UserError with the last line it wrote if it ends instead."""
    write_json(path, asdict(service))
    errors = path.with_suffix(".stderr")
    command = [sys.executable, "-m", "export.load_worker", str(path)]
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            command, env=process_environment(service.threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=stderr, text=True,
        ) as process,
    ):  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != "ready\n":
            process.wait()
            lines = [line for line in errors.read_text().splitlines() if line.strip()]
            raise UserError(lines[-1].strip() if lines else f"the server ended with status {process.returncode}")
        server = Server(process, rows)
        listener = threading.Thread(target=server.listen)
        listener.start()
        try:
            yield server
        finally:
            process.kill()
            listener.join()


def write_requests(documents: Sequence[np.ndarray], longest: int, seed: int, path: Path) -> None:
    """Save what `Service.arrays` names: real documents drawn at random, cut to `longest` tokens."""
    rows = draw_documents(documents, _REQUESTS, longest, seed)
    np.savez(path, ids=np.concatenate(rows), ends=np.cumsum([len(row) for row in rows]))


def run_load(service: Service, settings: Load, seed: int, path: Path) -> dict[str, Any]:
    """Start a server and measure it; failed, with the reason, if it ends."""
    try:
        with serving(service, _REQUESTS, path) as server:
            return measure_load(server, settings, seed)
    except UserError as error:
        return {"status": "failed", "reason": str(error).replace("\n", "; "), "points": []}


def measure_load(server: Server, settings: Load, seed: int) -> dict[str, Any]:
    """The latencies of one server at each rate, and the highest rate at which the 99th percentile holds the limit."""
    most_per_s = throughput(server, settings)

    def measure(rate_per_s: float) -> dict[str, Any]:
        return offer(server, arrivals_s(rate_per_s, settings.seconds, seed), settings) | {"rate_per_s": rate_per_s}

    floor_per_s = _FEWEST / (_LONGEST * settings.seconds)
    if settings.rates == "auto":
        points = search(measure, most_per_s, floor_per_s)
    else:
        points = [measure(rate_per_s) for rate_per_s in sorted(settings.rates)]
    holding = [point["rate_per_s"] for point in points if point["holds"]]
    contended = [point for point in points if point["cpu_share"] is not None and point["cpu_share"] < MIN_CPU_SHARE]
    reason = f"others used the CPU at {len(contended)} of {len(points)} rates" if contended else ""
    if not points:
        reason = f"rates below {floor_per_s:.2g}/s are not tried with bench.load.seconds {settings.seconds:g}: raise it"
    return {
        "status": "unstable" if reason else "ok",
        "reason": reason,
        "most_per_s": most_per_s,
        "highest_rate_per_s": max(holding, default=None),
        "points": sorted(points, key=lambda point: point["rate_per_s"]),
    }


def throughput(server: Server, settings: Load) -> float:
    """Requests a second with the queue never empty: of a burst that takes about half of `seconds`."""
    count = 2 * settings.max_batch
    elapsed_s = _burst(server, count)
    count = max(count, round(count / elapsed_s * settings.seconds / 2))
    return count / _burst(server, count)


def _burst(server: Server, count: int) -> float:
    started_s = time.monotonic()
    numbers = [server.send() for _ in range(count)]
    _wait(server, numbers, float("inf"))
    return max(server.answered[number][0] for number in numbers) - started_s


def search(measure: Callable[[float], dict[str, Any]], most_per_s: float, floor_per_s: float) -> list[dict[str, Any]]:
    """Points of a bisection for the highest rate that holds, between 0 and `most_per_s`.

    Rates below `floor_per_s` are not tried: a percentile there would take too long.
    """
    low, high, points = 0.0, most_per_s, []
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if middle < floor_per_s:
            break
        points.append(measure(middle))
        low, high = (middle, high) if points[-1]["holds"] else (low, middle)
    return points


def arrivals_s(rate_per_s: float, seconds: float, seed: int) -> np.ndarray:
    """Due times of a Poisson process of `rate_per_s`, for about `seconds`, at least 100 of them."""
    count = max(_FEWEST, round(rate_per_s * seconds))
    return np.random.default_rng(seed).exponential(1 / rate_per_s, count).cumsum()


def offer(server: Server, due_s: np.ndarray, settings: Load) -> dict[str, Any]:
    """Send a request at each due time, whatever became of those before, and see what they waited.

    What is unanswered `seconds` after the last one was due counts as never answered, and is dropped.
    """
    before = scheduled_s(server.process.pid)
    start_s = time.monotonic() + _LEAD_S
    numbers = []
    for at_s in start_s + due_s:
        time.sleep(max(0.0, at_s - time.monotonic()))
        numbers.append(server.send())
    _wait(server, numbers, start_s + due_s[-1] + settings.seconds)
    after = scheduled_s(server.process.pid)
    server.drop()
    answers = [server.answered.get(number) for number in numbers]
    waited_s = [np.inf if found is None else found[0] - at for found, at in zip(answers, start_s + due_s, strict=True)]
    return describe(waited_s, [found[1] for found in answers if found], settings.p99_limit_ms) | {
        "cpu_share": cpu_share(before, after)
    }


def describe(waited_s: Sequence[float], batches: Sequence[int], limit_ms: float) -> dict[str, Any]:
    """One rate as a report shows it; a percentile among requests that were never answered is None.

    Percentiles are waits that occurred: 99 of 100 requests waited no longer than the 99th percentile.
    """
    p50_ms, p99_ms = (float(np.percentile(waited_s, share, method="inverted_cdf")) * 1e3 for share in (50, 99))
    return {
        "requests": len(waited_s),
        "unanswered": len(waited_s) - len(batches),
        "p50_ms": p50_ms if np.isfinite(p50_ms) else None,
        "p99_ms": p99_ms if np.isfinite(p99_ms) else None,
        "mean_batch": float(np.mean([1 / size for size in batches])) ** -1 if batches else None,
        "holds": p99_ms <= limit_ms,
    }


def _wait(server: Server, numbers: Sequence[int], until_s: float) -> None:
    """Until all are answered, or it is `until_s`. UserError if the server ends."""
    while time.monotonic() < until_s and not all(number in server.answered for number in reversed(numbers)):
        if server.process.poll() is not None:
            raise UserError(f"the server ended with status {server.process.returncode} under load")
        time.sleep(0.002)

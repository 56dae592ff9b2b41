"""The process that answers requests of a load test: a queue, dynamic batching, one model in one backend.
When requests come, and what their answers took, the client in `load` decides and measures.

Lines in: `<request> <row>`, or `drop` for all that wait. Lines out: `ready`, then `<request> <size of its batch>`.
"""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.bench_inputs import pad_to_longest
from export.generate import Sampling, generate
from export.io_spec import read_spec
from export.runners import open_runner
from trainer.errors import UserError

Rows = Sequence[np.ndarray]
Request = tuple[int, int]  # its number, and its row of tokens


@dataclass(frozen=True)
class Service:
    """What is served, and how. `arrays` is an .npz: `ids` of all rows one after another, and their `ends`."""

    folder: str
    backend: Any
    provider: str
    threads: int
    arrays: str
    max_batch: int
    max_wait_s: float
    new_tokens: int


def main(path: Path) -> None:
    """Serve what the file `path` describes until standard input ends."""
    service = Service(**json.loads(path.read_text(encoding="utf-8")))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    with np.load(service.arrays) as archive:
        rows = np.split(archive["ids"], archive["ends"][:-1])
    answer = open_service(service)
    answer(rows[:1])
    answer(rows[: service.max_batch])
    requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
    threading.Thread(target=read_requests, args=(sys.stdin, requests), daemon=True).start()
    print("ready", file=answers, flush=True)
    while batch := take_batch(requests, service.max_batch, service.max_wait_s):
        answer([rows[row] for _, row in batch])
        answers.write("".join(f"{number} {len(batch)}\n" for number, _ in batch))
        answers.flush()


def open_service(service: Service) -> Callable[[Rows], object]:
    """What answers a batch: one forward pass, or, of a model that generates, as many new tokens as asked, greedily."""
    folder = Path(service.folder)
    spec = read_spec(folder)
    runner = open_runner(folder, service.backend, service.threads, service.provider, spec)
    if spec.cache is None:
        return lambda rows: runner.run(pad_to_longest(spec, rows))
    sampling = Sampling(service.new_tokens)
    return lambda rows: generate(runner, spec, [row.tolist() for row in rows], sampling)


def read_requests(lines: Iterable[str], requests: "queue.SimpleQueue[Request | None]") -> None:
    """Put requests into the queue as they come, so that no client ever waits to send; None at the end."""
    for line in lines:
        if line.strip() == "drop":
            while not requests.empty():
                requests.get_nowait()
            continue
        number, row = line.split()
        requests.put((int(number), int(row)))
    requests.put(None)


def take_batch(requests: "queue.SimpleQueue[Request | None]", most: int, wait_s: float) -> list[Request]:
    """The first request, and up to `most` with those that wait already or come within `wait_s`; empty at the end."""
    first = requests.get()
    if first is None:
        return []
    batch, until_s = [first], time.monotonic() + wait_s
    while len(batch) < most:
        try:
            request = requests.get(timeout=max(0.0, until_s - time.monotonic()))
        except queue.Empty:
            break
        if request is None:
            requests.put(None)
            break
        batch.append(request)
    return batch


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except UserError as error:  # `load` puts the last line into the report
        print(str(error).replace("\n", "; "), file=sys.stderr)
        raise SystemExit(error.exit_code) from None

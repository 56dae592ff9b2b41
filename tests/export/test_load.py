"""Load: arrivals keep their own clock, a late answer counts from when its request was due, and the search is short."""

import queue
import subprocess
import sys
import threading

import numpy as np
import pytest

from export.load import (
    Server,
    arrivals_s,
    describe,
    measure_load,
    offer,
    run_load,
    search,
    serving,
    write_requests,
)
from export.load_worker import Service, open_service, read_requests, take_batch
from trainer.config import Recipe
from trainer.export_config import Load

# Answers one request after another, and sleeps before the first.
STALLING = """
import sys, time
print("ready", flush=True)
for index, line in enumerate(sys.stdin):
    if line.strip() != "drop":
        if index == 0:
            time.sleep({stall_s})
        print(line.split()[0], 1, flush=True)
"""


@pytest.fixture
def stalling():
    """Starts a Server whose first answer takes `stall_s`."""
    started = []

    def start(stall_s):
        command = [sys.executable, "-c", STALLING.format(stall_s=stall_s)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        server = Server(process, rows=7)
        listener = threading.Thread(target=server.listen)
        listener.start()
        started.append((process, listener))
        return server

    yield start
    for process, listener in started:
        process.kill()
        listener.join()
        process.stdin.close()
        process.stdout.close()
        process.wait()


def service_of(folder, backend, arrays, max_batch=4):
    return Service(str(folder), backend, "CPUExecutionProvider", 1, str(arrays), max_batch, 0.0, 5)


def test_arrivals_are_a_poisson_process_of_their_seed():
    due_s = arrivals_s(200.0, 50.0, seed=3)
    assert len(due_s) == 10_000
    gaps_s = np.diff(due_s)
    assert gaps_s.min() >= 0
    assert gaps_s.mean() == pytest.approx(1 / 200, rel=0.05)
    assert gaps_s.std() == pytest.approx(1 / 200, rel=0.05)  # of an exponential distribution mean and deviation agree
    assert (arrivals_s(200.0, 50.0, seed=3) == due_s).all()
    assert (arrivals_s(200.0, 50.0, seed=4) != due_s).any()
    assert len(arrivals_s(1.0, 5.0, seed=0)) == 100  # or there is no 99th percentile


def test_a_stall_counts_for_all_who_were_due_meanwhile(stalling):
    """A client that asked again only after each answer would see one slow request of 100, and a p99 of next to 0."""
    point = offer(stalling(0.6), arrivals_s(400.0, 0.25, seed=0), Load(p99_limit_ms=300))
    assert (point["requests"], point["unanswered"]) == (100, 0)
    assert point["p50_ms"] > 300  # due within the first 0.3 s, answered after 0.6 s
    assert point["p99_ms"] > point["p50_ms"]
    assert point["holds"] is False


def test_what_is_never_answered_is_never_fast(stalling):
    point = offer(stalling(30.0), arrivals_s(2000.0, 0.05, seed=0), Load(p99_limit_ms=1e6, seconds=0.05))
    assert (point["unanswered"], point["p50_ms"], point["p99_ms"], point["mean_batch"]) == (100, None, None, None)
    assert point["holds"] is False


def test_percentiles_and_batches_by_hand():
    waited_s = [0.001 * wait for wait in range(1, 101)]
    found = describe(waited_s, [4] * 4 + [1], 98.9)
    assert (found["p50_ms"], found["p99_ms"]) == (pytest.approx(50.0), pytest.approx(99.0))
    assert found["holds"] is False and describe(waited_s, [1] * 100, 99.1)["holds"] is True
    assert found["mean_batch"] == pytest.approx(2.5)  # five requests in two batches
    assert describe([*waited_s[:-1], np.inf], [1] * 99, 1e9)["holds"] is True  # one of 100 is beyond the percentile
    two_lost = describe([*waited_s[:-2], np.inf, np.inf], [1] * 98, 1e9)
    assert (two_lost["p99_ms"], two_lost["unanswered"], two_lost["holds"]) == (None, 2, False)


def test_the_search_ends_within_a_32nd_below_the_highest_rate_that_holds():
    def measure(rate):
        return {"rate_per_s": rate, "holds": rate <= 37.0}

    points = search(measure, 64.0, 0.1)
    assert [point["rate_per_s"] for point in points] == [32.0, 48.0, 40.0, 36.0, 38.0]
    assert max(point["rate_per_s"] for point in points if point["holds"]) == 36.0
    never = search(lambda rate: {"rate_per_s": rate, "holds": False}, 64.0, 10.0)
    assert [point["rate_per_s"] for point in never] == [32.0, 16.0]  # 8 a second would take too long


def test_a_server_too_slow_for_the_search_is_told(stalling):
    """100 requests in the six times 0.1 ms that a rate may take at the most: more than any server does."""
    found = measure_load(stalling(0.0), Load(p99_limit_ms=1e6, seconds=0.0001, max_batch=1), seed=0)
    assert (found["status"], found["highest_rate_per_s"], found["points"]) == ("unstable", None, [])
    assert found["reason"] == "rates below 1.7e+05/s are not tried with bench.load.seconds 0.0001: raise it"


def test_batches_take_what_waits_up_to_their_size():
    waiting = queue.SimpleQueue()
    read_requests(["0 3\n", "1 4\n", "drop\n", "2 5\n", "3 6\n", "4 0\n"], waiting)
    assert take_batch(waiting, 2, 0.0) == [(2, 5), (3, 6)]
    assert take_batch(waiting, 2, 60.0) == [(4, 0)]  # the end of requests ends the wait too
    assert take_batch(waiting, 2, 0.0) == []


def test_a_batch_waits_for_others_as_long_as_it_may():
    waiting = queue.SimpleQueue()
    waiting.put((0, 0))
    threading.Timer(0.05, waiting.put, [(1, 1)]).start()
    assert take_batch(waiting, 2, 60.0) == [(0, 0), (1, 1)]


def test_a_real_server_answers_at_each_rate(exported_folder, documents, tmp_path):
    write_requests(documents, 24, 0, tmp_path / "requests.npz")
    service = service_of(exported_folder("bert"), "onnx_fp32", tmp_path / "requests.npz")
    with serving(service, 256, tmp_path / "service.json") as server:
        found = measure_load(server, Load(p99_limit_ms=1e6, rates=(400.0, 200.0), seconds=0.25, max_batch=4), seed=0)
        too_strict = measure_load(server, Load(p99_limit_ms=1e-3, seconds=0.25, max_batch=4), seed=0)
    assert [point["rate_per_s"] for point in found["points"]] == [200.0, 400.0]
    assert found["highest_rate_per_s"] == 400.0
    for point in found["points"]:
        assert (point["requests"], point["unanswered"]) == (100, 0)
        assert 0 < point["p50_ms"] <= point["p99_ms"]
        assert 1 <= point["mean_batch"] <= 4
    assert found["most_per_s"] > 0
    assert too_strict["highest_rate_per_s"] is None
    assert server.process.returncode is not None


def test_a_server_that_does_not_open_is_a_failed_entry(documents, tmp_path, model_folder):
    write_requests(documents, 8, 0, tmp_path / "requests.npz")
    service = service_of(model_folder("bert"), "onnx_fp32", tmp_path / "requests.npz")
    found = run_load(service, Load(p99_limit_ms=1.0), 0, tmp_path / "service.json")
    assert (found["status"], found["points"]) == ("failed", [])
    assert "model.onnx is not there" in found["reason"]


def test_a_decoder_answers_with_new_tokens(model_folder, tmp_path):
    answer = open_service(service_of(model_folder("gpt2"), "eager", tmp_path / "unused.npz"))
    rows = [np.arange(5, 12), np.arange(20, 23)]
    assert [len(tokens) for tokens in answer(rows)] == [5, 5]


def test_the_recipe_may_load_only_what_it_measures():
    with pytest.raises(ValueError, match="load.backends has compile, which backends has not"):
        Recipe.model_validate({"run_dir": "x", "bench": {"backends": ["eager"], "load": {
            "p99_limit_ms": 5, "backends": ["eager", "compile"]}}})  # fmt: skip

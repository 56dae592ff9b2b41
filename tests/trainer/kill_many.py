"""Runs a verb again and again, killing it with SIGKILL after each of the given delays, until it ends by itself.

    python kill_many.py RECIPE VERB METRICS_FILE DELAY_S [DELAY_S ...]

A delay counts from the moment the attempt first writes to METRICS_FILE, so that a slow machine moves no instant.

Heavy imports happen once; each attempt is a fork, so that many instants can be tried in a minute.
Prints one JSON object: exit code of the last attempt, and how many attempts were killed.
"""

import json
import os
import signal
import sys
import time

from transformers import BertForMaskedLM, GPT2LMHeadModel, PreTrainedTokenizerFast  # noqa: F401 - warm

import trainer.distill
import trainer.pretrain  # noqa: F401 - warm
from trainer.__main__ import main


def size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def attempt(recipe: str, verb: str, metrics: str, delay_s: float) -> int | None:
    """Exit code of one attempt; None if it was killed `delay_s` after its first sign of life."""
    before, deadline = size(metrics), float("inf")
    pid = os.fork()
    if pid == 0:
        os._exit(main([verb, recipe]))
    while time.monotonic() < deadline:
        if deadline == float("inf") and size(metrics) > before:
            deadline = time.monotonic() + delay_s
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    recipe, verb, metrics, *delays = sys.argv[1:]
    killed, code = 0, None
    for delay_s in [*map(float, delays), float("inf")]:
        code = attempt(recipe, verb, metrics, delay_s)
        if code is not None:
            break
        killed += 1
    print(json.dumps({"code": code, "killed": killed}))

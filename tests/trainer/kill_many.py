"""Runs a verb again and again, killing it with SIGKILL after each of the given delays, until it ends by itself.

    python kill_many.py RECIPE VERB DELAY_S [DELAY_S ...]

Heavy imports happen once; each attempt is a fork, so that many instants can be tried in a minute.
Prints one JSON object: exit code of the last attempt, and how many attempts were killed.
"""

import json
import os
import signal
import sys
import time

import trainer.distill
import trainer.pretrain
from trainer.__main__ import main


def attempt(recipe: str, verb: str, delay_s: float | None) -> int | None:
    """Exit code of one attempt; None if it was killed after `delay_s`."""
    pid = os.fork()
    if pid == 0:
        os._exit(main([verb, recipe]))
    deadline = time.monotonic() + delay_s if delay_s is not None else float("inf")
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    recipe, verb, *delays = sys.argv[1:]
    killed, code = 0, None
    for delay_s in [*map(float, delays), None]:
        code = attempt(recipe, verb, delay_s)
        if code is not None:
            break
        killed += 1
    print(json.dumps({"code": code, "killed": killed}))

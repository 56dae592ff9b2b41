"""`lmworks` with something planted in it: python run_with.py [--overflow-at STEP ...] [--stop-before STEP]
[--deterministic] -- ARGUMENTS. Steps count from 0."""

import argparse
import math
import sys

import torch

import trainer.engine.loop as loop
from trainer.__main__ import main
from trainer.engine.engine import Engine
from trainer.engine.launch import leave


def overflow_at(steps):
    """The loss of these steps is infinite, so that no gradient is finite."""
    real, seen = Engine.backward, []

    def backward(self, loss, last):
        real(self, loss * math.inf if len(seen) in steps else loss, last)
        seen.append(last)

    Engine.backward = backward


def stop_before(stop):
    """As if a signal had come there."""
    real = loop.count_targets

    def stopping(run, step, batches):
        counts, stopped = real(run, step, batches)
        return counts, stopped or step == stop

    loop.count_targets = stopping


if __name__ == "__main__":
    at = sys.argv.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--overflow-at", type=int, nargs="+", default=[])
    parser.add_argument("--stop-before", type=int)
    parser.add_argument("--deterministic", action="store_true")
    planted = parser.parse_args(sys.argv[1:at])
    overflow_at(planted.overflow_at)
    stop_before(planted.stop_before)
    if planted.deterministic:
        torch.use_deterministic_algorithms(True)
    leave(main(sys.argv[at + 1 :]))

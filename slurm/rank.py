"""What a job's launcher starts: one verb, whose exit code is left in a file, as torchrun turns every code into 1.
What the codes lead to is the batch script's decision, see job.sh."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from trainer.__main__ import main
from trainer.engine.launch import leave
from trainer.errors import EXIT_PREEMPTED, Preempted

EXIT_BROKEN = 70  # EX_SOFTWARE of sysexits.h: an exception that is no message to a user
_TRAINS = ("pretrain", "distill")


def run(outcome: Path, verb: str, recipe: str) -> NoReturn:
    """Run a verb as one rank, leave its exit code in the folder `outcome` (<job>.<requeues>.<attempt>), and end.

    A rank that was preempted ends with 0: with another code the launcher would kill the ranks that still save.
    """
    if verb not in _TRAINS:
        signal.signal(signal.SIGUSR1, _stop_at_once)
        signal.signal(signal.SIGTERM, _stop_at_once)
    # `resume: false` is for the first start of a job; at another one it would begin at step 0 again.
    first = outcome.name.endswith(".0.1")
    overrides = [] if first or verb not in _TRAINS else [f"{verb}.resume=true"]
    code = EXIT_BROKEN
    try:
        code = main([verb, recipe, *overrides])
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it is over: a late signal changes nothing
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (outcome / os.environ.get("RANK", "0")).write_text(f"{code}\n")
    leave(0 if code == EXIT_PREEMPTED else code)


def _stop_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """A stage that does not train ends at once; prepare goes on at the next start, the others begin anew."""
    raise Preempted(f"stopped by {signal.Signals(number).name}; the next start takes it up again")


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], sys.argv[3])

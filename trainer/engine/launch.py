"""How a training process begins and ends under a launcher: the ranks that were asked for, and a clean way out.
Imports nothing heavy, because the command line asks it before it knows what will run."""

import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

_stop_signal: str | None = None
_before: dict[int, Any] = {}  # what the watched signals did before they were watched


def ensure_ranks() -> None:
    """Start the ranks that `accelerate launch --num_processes N` was asked for, where it started only one.

    Without a GPU and without `--multi_gpu`, Accelerate 1.15 ignores --num_processes and starts one process
    (commands/launch.py, simple_launcher). The process then replaces itself by the launch that was meant.
    """
    if "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return
    command = _launcher_command()
    if _asked_processes(command) < 2 or "--multi_gpu" in command:
        return
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")] + ["MASTER_ADDR", "MASTER_PORT"]:
        os.environ.pop(name, None)
    rest = [word for word in command if word != "--cpu"]
    print(f"accelerate launch started one process of {_asked_processes(command)}; starting them all", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *rest])


def _launcher_command() -> list[str]:
    """Arguments of the `accelerate launch` that started this process; empty if there is none."""
    import psutil

    try:
        words = psutil.Process().parent().cmdline()  # type: ignore[union-attr] - no parent: AttributeError
    except (AttributeError, psutil.Error):
        return []
    for index, word in enumerate(words[:4]):
        if word in ("launch", "accelerate.commands.launch") or word.endswith("accelerate-launch"):
            return words[index + 1 :]
    return []


def _asked_processes(command: list[str]) -> int:
    for index, word in enumerate(command):
        name, _, value = word.partition("=")
        if name.replace("-", "_") == "__num_processes":
            text = value or (command[index + 1] if index + 1 < len(command) else "")
            return int(text) if text.isdigit() else 0
    return 0


def watch_signals() -> None:
    """From now on SIGTERM, SIGINT and SIGUSR1 ask the run to save and stop, instead of ending it."""
    global _stop_signal
    _stop_signal = None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        was = signal.signal(number, _remember)
        if was is not _remember:
            _before[number] = was


def release_signals() -> None:
    """Give the signals back the meaning they had: a batch script has its launchers ignore SIGUSR1."""
    for number, was in _before.items():
        signal.signal(number, was)


def stop_requested() -> bool:
    """Whether this process got one of the watched signals."""
    return _stop_signal is not None


def _remember(number: int, frame: FrameType | None) -> None:
    global _stop_signal
    _stop_signal = signal.Signals(number).name


def leave(code: int) -> NoReturn:
    """End the process with `code`; with several ranks, without the interpreter's tear-down.

    All is written by now, and a gloo rank aborts in tear-down now and then ("terminate called without an active
    exception", seen in 1 of 40 exits with torch 2.13), which the launcher would report as a failed run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)

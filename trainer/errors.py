"""What a user sees when a run cannot go on: one message, one exit code, no traceback.
It leaves the wording of each message to the place that found the problem."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # what an OSError says where a file system or a quota has no room

EXIT_GATE_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_BUSY = 69  # EX_UNAVAILABLE of sysexits.h
EXIT_RANK_LOST = 71  # EX_OSERR of sysexits.h
EXIT_DISK_FULL = 74  # EX_IOERR of sysexits.h
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"


class UserError(Exception):
    """Something the user can mend: says what was found, what was needed and what to do."""

    exit_code = EXIT_USER_ERROR

    def __init__(self, found: str, needed: str = "", do: str = "") -> None:
        parts = [found, f"Needed: {needed}" if needed else "", f"Do: {do}" if do else ""]
        super().__init__("\n".join(part for part in parts if part))


class GateFailed(UserError):
    """A measured value missed its threshold, so the stage did not deliver."""

    exit_code = EXIT_GATE_FAILED


class RankLost(UserError):
    """A rank ended or hangs, so the others cannot go on; the last checkpoint is whole."""

    exit_code = EXIT_RANK_LOST


class OtherRun(UserError):
    """The checkpoints that are there were made with other settings or inputs; the chain sets them aside."""


class Busy(UserError):
    """Another process is at work there: the same command is right later."""

    exit_code = EXIT_BUSY


class Preempted(Exception):
    """All ranks agreed to stop at a signal and the state is saved: run the same command again."""

    exit_code = EXIT_PREEMPTED


def as_os_error(error: Exception) -> OSError:
    """What the system said, also where safetensors wraps it: `I/O error: No space left on device (os error 28)`."""
    if isinstance(error, OSError):
        return error
    full = "No space left" in str(error) or "os error 28" in str(error)
    return OSError(errno.ENOSPC if full else errno.EIO, f"{type(error).__name__}: {error}")

"""The ranks of a run: who this process is, numbers and votes of the host between them, and who is missing if one hangs.
What tensors a strategy sends between devices is its own affair."""

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.errors import RankLost

# How far apart the ranks that live notice that one is missing: they wait in the same collective, but did not all
# begin to at the same moment. Assumed.
_NOTICE_S = 5.0

# What torch, gloo and NCCL say, in lower case, where another rank is gone or cannot be reached
_GONE = (
    "timed out",
    "timeout",
    "connection closed",
    "connection reset",
    "connection refused",
    "broken pipe",
    "no route to host",
    "remote process exited or there was a network error",
    "unhandled system error",
    "communicator was aborted",
)
# ... and what CUDA says where this rank's own GPU failed
_DEVICE_FAILED = ("uncorrectable ecc error", "unspecified launch failure")


class Ranks:
    """This process among all of a run. Host numbers go over a gloo group of their own: they never make a GPU wait."""

    def __init__(self, rank: int, world: int, timeout_s: float) -> None:
        self.rank, self.world = rank, world
        self._timeout_s = timeout_s
        self._doing = "at the start"
        self._group: Any = None
        if world > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self._store = dist.distributed_c10d._get_default_store()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float], doing: str = "waiting for the others") -> list[float]:
        """Sums over all ranks, of numbers on the host. `doing` names the call if a rank never comes to it."""
        if self._group is None:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        with self._together(doing):
            dist.all_reduce(total, group=self._group)
        return total.tolist()

    def agree(self, vote: bool, doing: str = "voting") -> bool:
        """Whether any rank votes yes; every rank gets the same answer."""
        return self.sum([float(vote)], doing)[0] > 0

    def wait(self, doing: str = "waiting for the others") -> None:
        """Until all ranks are here."""
        self.sum([0.0], doing)

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._group is None:
            return value
        box = [value]
        with self._together("waiting for word from rank 0"):
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world
        with self._together("telling the others"):
            dist.all_gather_object(values, value, group=self._group)
        return values

    @contextlib.contextmanager
    def _together(self, doing: str) -> Iterator[None]:
        """Around a collective: says where this rank is, and what its failure means."""
        self._arrive(doing)
        with self.naming_the_lost():
            yield

    @contextlib.contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Around all that may miss a rank, as a strategy's own collectives do before the host's."""
        try:
            yield
        except RuntimeError as error:
            if (lost := self.lost(error)) is not error:
                raise lost from error
            raise

    def lost(self, error: RuntimeError) -> Exception:
        """What a failed collective means: RankLost naming who is missing, or the error itself if it is another."""
        text = str(error)
        if _says(error, _DEVICE_FAILED):
            return RankLost(
                f"rank {self.rank}, {self._doing}: its GPU failed: {_first_line(text)}",
                "a GPU that works",
                "look at its node (nvidia-smi, dmesg), and run the same command again: it resumes",
            )
        if self._group is None or not _says(error, _GONE):
            return error
        missing = [f"rank {rank} (last seen {self._last_seen(rank)})" for rank in self._silent()]
        return RankLost(
            f"rank {self.rank}, {self._doing}, waited for {', '.join(missing) or 'a rank that ended'}: "
            f"{_first_line(text)}",
            f"all {self.world} ranks within {self._timeout_s:g} s (engine.collective_timeout_s)",
            "look at the log of that rank and its node, and run the same command again: it resumes",
        )

    def _silent(self) -> list[int]:
        """Ranks that do not notice within a few seconds that one is missing, as those that live do: it is they."""
        silent = [rank for rank in range(self.world) if rank != self.rank]
        deadline = time.monotonic() + _NOTICE_S
        try:
            self._store.set(f"lmworks/noticed/{self.rank}", "yes")
            while silent and time.monotonic() < deadline:
                silent = [rank for rank in silent if not self._store.check([f"lmworks/noticed/{rank}"])]
                time.sleep(0.1)
        except RuntimeError:  # the store ended with the rank that held it
            return silent
        return silent

    def _arrive(self, doing: str) -> None:
        """Tell the store, which outlives a hanging rank, where this one is."""
        self._doing = doing
        self._store.set(f"lmworks/at/{self.rank}", doing)

    def _last_seen(self, rank: int) -> str:
        key = f"lmworks/at/{rank}"
        try:
            return self._store.get(key).decode() if self._store.check([key]) else "at the start"
        except RuntimeError:
            return "nowhere: the store does not answer"


@contextlib.contextmanager
def naming_who_never_came() -> Iterator[None]:
    """Around the forming of a group of ranks, when there is no `Ranks` yet to ask who is missing."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistStoreError) or _says(error, _GONE)):
            raise
        raise RankLost(
            f"the ranks never came together: {_first_line(str(error))}",
            "all of them, reaching one another at MASTER_ADDR and MASTER_PORT",
            "look at the logs of all ranks and their nodes, and run the same command again: it resumes",
        ) from error


def _says(error: RuntimeError, signs: tuple[str, ...]) -> bool:
    return any(sign in str(error).lower() for sign in signs)


def _first_line(text: str) -> str:
    return text.partition("\n")[0]

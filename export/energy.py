"""Joules of a call on a GPU, from the card's own counter of the energy that it used since its driver was loaded, and
the memory that is taken on it (NVML).
Which calls, and what their times are, is the benchmark's business; `nvidia-smi` tells power now and then, not energy.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from export.windows import Clock

# The counter moves in steps, as cards take their power every 20 to 100 ms (Yang et al. 2023, arXiv:2312.02741): over
# this long a step at either end is 3 % at the most.
_STRETCH_S = 3.0
_FEWEST_CALLS = 3


class Counter(Protocol):
    """What a card says of its energy."""

    def joules(self) -> float:
        """Used since some moment."""
        ...

    def users(self) -> int:
        """How many processes compute on the card; the counter is of all of them together."""
        ...

    def taken_mib(self) -> float:
        """Memory in use on the card beyond what was when the counter was opened."""
        ...


@dataclass(frozen=True)
class NvmlCounter:
    """The counter of one card."""

    library: Any
    handle: Any
    used_before: int = 0
    """Bytes."""

    def joules(self) -> float:
        return self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3  # mJ

    def users(self) -> int:
        return len(self.library.nvmlDeviceGetComputeRunningProcesses(self.handle))

    def taken_mib(self) -> float:
        return (self.library.nvmlDeviceGetMemoryInfo(self.handle).used - self.used_before) / 2**20


def open_counter() -> tuple[NvmlCounter | None, str]:
    """The counter of the GPU that CUDA takes first here, or None and why there is none."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None, "pynvml is not installed: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        cards = [(_text(pynvml.nvmlDeviceGetUUID(one)), _text(pynvml.nvmlDeviceGetName(one))) for one in handles]
        index = first_visible(cards, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER"))
        if isinstance(index, str):
            return None, index
        counter = NvmlCounter(pynvml, handles[index], pynvml.nvmlDeviceGetMemoryInfo(handles[index]).used)
        counter.joules()
    except pynvml.NVMLError as error:  # from before Volta a card has no such counter
        return None, f"NVML: {error}"
    return counter, ""


def first_visible(cards: Sequence[tuple[str, str]], visible: str | None, order: str | None) -> int | str:
    """Which of NVML's cards (UUID, name) CUDA takes first, or why that cannot be told.

    NVML counts cards by their place on the bus, CUDA those of one kind too, but faster kinds first unless
    CUDA_DEVICE_ORDER is PCI_BUS_ID (CUDA's programming guide, environment variables).
    """
    first = (visible or "").split(",")[0].strip()
    if first.startswith("MIG-"):
        return "the card's energy is that of all its MIG parts"
    if first and not first.isdigit():
        found = [index for index, (uuid, _) in enumerate(cards) if uuid.startswith(first)]
        return found[0] if len(found) == 1 else f"CUDA_VISIBLE_DEVICES names {first}, which is no card of NVML's"
    index = int(first or 0)
    if index >= len(cards):
        return f"CUDA_VISIBLE_DEVICES names card {index}, NVML has {len(cards)}"
    if order != "PCI_BUS_ID" and len({name for _, name in cards}) > 1:
        return "cards of several kinds are here: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
    return index


def joules_per_call(call: Callable[[], object], counter: Counter, clock: Clock) -> float | str:
    """Energy of the card over calls without a pause for 3 s, at least three, divided by their number; what it draws
    when idle is in it. Or why there is no figure: another process computed there too, or the counter stood still."""
    began_s, before, calls, users = clock.wall_s(), counter.joules(), 0, counter.users()
    while calls < _FEWEST_CALLS or clock.wall_s() - began_s < _STRETCH_S:
        call()
        calls += 1
    used = counter.joules() - before
    if max(users, counter.users()) > 1:
        return "another process computed on the same GPU"
    return used / calls if used > 0 else f"the GPU's counter did not move in {_STRETCH_S:g} s"


def columns(joules: float | str, requests: int, tokens: int) -> dict[str, float | str]:
    """What a row says of a call that answers so many requests of so many tokens together, or why it says nothing."""
    if isinstance(joules, str):
        return {"no_energy": joules}
    return {"joules_per_request": joules / requests, "joules_per_token": joules / tokens}


def _text(value: str | bytes) -> str:
    """Older bindings give bytes."""
    return value.decode() if isinstance(value, bytes) else value

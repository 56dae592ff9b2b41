"""Pieces of parameters that a rank holds, and the files that keep them, whichever strategy cut the parameters up.
What one number of ranks under one ZeRO stage wrote, any other reads; who holds which piece is the strategies' affair.

A file is safetensors; its entries are flat float32 pieces named `<key>/<first element>/<parameter>`, where key is
`weight` or the name of an elementwise optimizer state, such as `exp_avg`.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHT = "weight"
_MOST_OPEN = 500  # files; below the 1,024 that a process may have open where nobody raised it


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a flattened parameter, with their optimizer state, as one rank holds them."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    numel: int
    read: Callable[[str], Tensor]  # key -> flat float32 [numel]; may be a view of what is trained
    write: Callable[[str, Tensor], None]  # key, flat float32 [numel] on any device
    saved: bool = True  # False: another rank holds the same and saves it


def of_views(
    name: str, shape: Sequence[int], start: int, numel: int, views: Callable[[str], Tensor], saved: bool = True
) -> Fragment:
    """A fragment whose numbers lie in memory: `views(key)` gives them flat, to be read and written in place."""

    def write(key: str, value: Tensor) -> None:
        views(key).copy_(value)

    return Fragment(name, tuple(shape), start, numel, views, write, saved)


def snapshot(fragments: Iterable[Fragment], keys: Sequence[str]) -> dict[str, Tensor]:
    """Entries of one rank's file, copied to host memory: what is trained afterwards does not change them."""
    with torch.no_grad():
        return {
            f"{key}/{fragment.start}/{fragment.name}": fragment.read(key).detach().to("cpu", copy=True).contiguous()
            for fragment in fragments
            if fragment.saved
            for key in keys
        }


def write_file(path: Path, entries: dict[str, Tensor]) -> None:
    """Write what `snapshot` took."""
    save_file(entries, path)


@dataclass(frozen=True)
class _Piece:
    path: Path
    entry: str
    start: int
    stop: int


class FragmentFiles:
    """All pieces in a folder, found by key and parameter. Files stay open as long as this lives.

    Each parameter may have a piece in every rank's file: 300 of them in 256 files would be 76,800 opens.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        # The cache drops the file that was not used for longest, which closes it.
        self._open = functools.lru_cache(maxsize=_MOST_OPEN)(lambda path: safe_open(path, "pt"))
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        for path in paths:
            file = self._open(path)
            for entry in file.keys():  # noqa: SIM118 - not a mapping
                key, start, name = entry.split("/", 2)
                (numel,) = file.get_slice(entry).get_shape()
                self._pieces[key, name].append(_Piece(path, entry, int(start), int(start) + numel))

    @property
    def keys(self) -> set[str]:
        """Keys that are there: `weight` and the optimizer's."""
        return {key for key, _ in self._pieces}

    @property
    def names(self) -> set[str]:
        """Parameters that are there."""
        return {name for _, name in self._pieces}

    def load(self, key: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of one parameter, flat, on the host. Raises KeyError for a gap."""
        whole = torch.empty(numel, dtype=torch.float32)
        covered = 0
        for piece in self._pieces[key, name]:
            first, last = max(start, piece.start), min(start + numel, piece.stop)
            if first >= last:
                continue
            part = self._open(piece.path).get_slice(piece.entry)[first - piece.start : last - piece.start]
            whole[first - start : last - start] = part
            covered += last - first
        if covered != numel:
            raise KeyError(f"{key} of {name}: {covered} of the elements {start} to {start + numel} are there")
        return whole

    def restore(self, fragments: Iterable[Fragment], keys: Sequence[str]) -> None:
        """Fill a rank's fragments, however the files were cut."""
        with torch.no_grad():
            for fragment in fragments:
                for key in keys:
                    fragment.write(key, self.load(key, fragment.name, fragment.start, fragment.numel))

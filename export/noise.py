"""How far two measurements of one thing lie apart, and which rows that leaves without an order between them.
What is measured twice `bench` decides; where ranks are shown, `report`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SHAPE = ("batch_size", "sequence_length", "lengths")


def compare(first: Iterable[Mapping[str, Any]], again: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of one model in one backend from two processes: both medians at each shape where both are stable.

    `relative` is the largest difference of all shapes; None where no shape has two stable medians.
    """
    medians_ms = {tuple(row[key] for key in _SHAPE): row["p50_ms"] for row in again if row["status"] == "ok"}
    shapes = []
    for row in first:
        other_ms = medians_ms.get(tuple(row[key] for key in _SHAPE))
        if row["status"] == "ok" and other_ms is not None:
            shape = {key: row[key] for key in _SHAPE} | {"p50_ms": row["p50_ms"], "again_ms": other_ms}
            shapes.append(shape | {"relative": difference(row["p50_ms"], other_ms)})
    return {"relative": max((shape["relative"] for shape in shapes), default=None), "shapes": shapes}


def difference(one: float, other: float) -> float:
    """How much longer the longer one is, relative to the shorter."""
    return max(one, other) / min(one, other) - 1


def rank(value: float, values: Sequence[float], noise: float) -> tuple[int, bool]:
    """The place of one of `values`, the smallest first, and whether others lie within the noise of it.

    Only those count before it that are smaller by more than the noise.
    """
    before = sum(other < value and difference(value, other) > noise for other in values)
    within = sum(difference(value, other) <= noise for other in values)
    return before + 1, within > 1

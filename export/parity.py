"""The gate between a model and its exported form: same signature, same numbers on real text in many shapes.
Which text and which shapes is `cases`' business; what happens to a model that fails is the stage's.

Shape letters: B batch, T sequence length, P length of the past, V vocabulary (or classes), K heads, D their size,
N compared positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.cache import run_in_steps
from export.cases import Case
from export.io_spec import BATCH, SEQUENCE, TOTAL, IoSpec, Port
from export.runners import Arrays, OnnxRunner
from trainer.errors import GateFailed
from trainer.export_config import Tolerance

# Scores that differ by less, relative to the highest, are equal: some ten times fp32's rounding in these models.
_TIE = 1e-5


@dataclass(frozen=True)
class Difference:
    """How one output of one case differs from the source's, on positions that are not padding.

    `positions` are those at which the highest score is asked for: rows, for the start of an answer; none of a cache or
    of hidden states, whose values are no scores.
    """

    case: str
    output: str
    max_abs: float
    position: tuple[int, ...]
    squared_error: float
    squared_source: float
    agreeing: int
    positions: int

    @property
    def relative_rms(self) -> float:
        return float(np.sqrt(self.squared_error / max(self.squared_source, np.finfo(np.float64).tiny)))

    @property
    def top1(self) -> float:
        return self.agreeing / self.positions if self.positions else 1.0


def check_parity(
    what: str,
    spec: IoSpec,
    candidate: OnnxRunner,
    cases: Sequence[Case],
    expected: Sequence[Mapping[str, np.ndarray]],
    tolerance: Tolerance,
) -> dict[str, Any]:
    """Hold `candidate` against the source's outputs `expected` (one mapping a case); returns the evidence of passing.

    Raises GateFailed at the first miss: another signature, a shape that does not run, a non-finite output, or a
    difference beyond `tolerance`. `max_abs` and `relative_rms` hold for each case, `min_top1` over all of them.
    """
    check_signature(what, spec, candidate)
    found = []
    for case, source in zip(cases, expected, strict=True):
        actual = _run(what, spec, candidate, case)
        for port in spec.outputs:
            found.append(compare(what, case, port, source[port.name], actual[port.name]))
            _check_difference(what, found[-1], tolerance)
    positions = sum(item.positions for item in found)
    if not positions and tolerance.max_abs is None and tolerance.relative_rms is None:
        raise GateFailed(
            f"{what}: it has no scores whose highest could agree, and no limit on differences",
            "a limit",
            "set max_abs or relative_rms in export.parity",
        )
    top1 = sum(item.agreeing for item in found) / positions if positions else 1.0
    if top1 < tolerance.min_top1:
        worst = min(found, key=lambda item: item.top1)
        raise GateFailed(
            f"{what}: the highest logit agrees at {top1:.2%} of positions, least in case {worst.case}, output "
            f"{worst.output} ({worst.top1:.2%}; largest difference {worst.max_abs:.3g} at {worst.position})",
            f"at least {tolerance.min_top1:.2%}",
        )
    return {
        "metrics": {
            "cases": len(cases),
            "positions": positions,
            "max_abs": max(item.max_abs for item in found),
            "relative_rms": max(item.relative_rms for item in found),
            "top1": top1,
        },
        "thresholds": tolerance.model_dump(),
        "cases": [
            {"case": i.case, "output": i.output, "max_abs": i.max_abs, "relative_rms": i.relative_rms, "top1": i.top1}
            for i in _telling(found)
        ],
    }


def holds_under(metrics: Mapping[str, Any], tolerance: Tolerance) -> bool:
    """Whether evidence that was gathered under one tolerance would pass under another."""
    limits = (("max_abs", tolerance.max_abs), ("relative_rms", tolerance.relative_rms))
    near = all(limit is None or metrics[name] <= limit for name, limit in limits)
    return near and metrics["top1"] >= tolerance.min_top1


def check_signature(what: str, spec: IoSpec, candidate: OnnxRunner) -> None:
    """Raise GateFailed unless the graph has exactly the spec's inputs and outputs: names, types and axes."""
    for kind, declared, needed in (
        ("inputs", candidate.inputs, spec.inputs),
        ("outputs", candidate.outputs, spec.outputs),
    ):
        if set(declared) != set(needed):
            raise GateFailed(
                f"{what}: the graph's {kind} are {_listed(declared, needed)}", f"exactly {_listed(needed, needed)}"
            )


def _listed(ports: Sequence[Port], needed: Sequence[Port]) -> str:
    return ", ".join(f"{port}" if port in needed else f"{port} (not as declared)" for port in ports)


def compare(what: str, case: Case, port: Port, source: np.ndarray, actual: np.ndarray) -> Difference:
    """The difference of one output: [B, T, V], [B, T] and keys' and values' [B, K, P + T, D] on unmasked positions,
    [B, V] on all rows.

    A place is told as row, position and what is left of the axes. Raises GateFailed for another shape or a value that
    is not finite.
    """
    if source.shape != actual.shape:
        raise GateFailed(f"{what}: case {case.name}, output {port.name}: shape {actual.shape}", f"shape {source.shape}")
    compared, source_NV, inner = _rows(case, port, source)
    _, actual_NV, _ = _rows(case, port, actual)
    places = np.argwhere(compared)

    def place(row: int, column: int) -> tuple[int, ...]:
        return (*places[row].tolist(), *map(int, np.unravel_index(column, inner)))

    if not np.isfinite(actual_NV).all():
        row, column = np.argwhere(~np.isfinite(actual_NV))[0]
        where = place(row, column)
        raise GateFailed(f"{what}: case {case.name}, output {port.name}, position {where}: {actual_NV[row, column]}")
    difference_NV = np.abs(actual_NV - source_NV)
    row, column = map(int, np.unravel_index(int(difference_NV.argmax()), difference_NV.shape))
    if port.axes == (BATCH, SEQUENCE):  # the tokens of a row compete
        source_NV, actual_NV = (np.where(case.mask_BT, value, -np.inf) for value in (source, actual))
    agreeing, positions = _agreement(source_NV, actual_NV) if port.name.endswith("logits") else (0, 0)
    return Difference(
        case=case.name,
        output=port.name,
        max_abs=float(difference_NV[row, column]),
        position=place(row, column),
        squared_error=float(np.square(difference_NV).sum()),
        squared_source=float(np.square(source_NV).sum()),
        agreeing=agreeing,
        positions=positions,
    )


def _agreement(source_NV: np.ndarray, actual_NV: np.ndarray) -> tuple[int, int]:
    """At how many positions the candidate's highest score is the source's, too, and of how many.

    One that ties with it does as well: equal tokens far apart have equal scores but for the order of addition.
    """
    highest_N = source_NV.max(axis=1)
    chosen_N = np.take_along_axis(source_NV, actual_NV.argmax(axis=1)[:, None], axis=1)[:, 0]
    agreeing_N = highest_N - chosen_N <= _TIE * np.abs(highest_N)
    return int(agreeing_N.sum()), len(agreeing_N)


def _rows(case: Case, port: Port, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Which rows of an output count, these as float64 [N, values a position], and the shape of one row's values."""
    if TOTAL in port.axes or SEQUENCE in port.axes[2:]:
        value = value.swapaxes(1, 2)
        compared = case.mask
    else:
        compared = case.mask_BT if SEQUENCE in port.axes else np.ones(value.shape[:1], dtype=bool)
    rows = value[compared].astype(np.float64)
    return compared, rows.reshape(len(rows), -1), rows.shape[1:]


def _telling(found: Sequence[Difference]) -> list[Difference]:
    """One entry for each case and output, but only one for the worst of a cache: a decoder has dozens."""
    kept: dict[tuple[str, str], Difference] = {}
    for item in found:
        key = (item.case, item.output.split(".")[0])
        if key not in kept or kept[key].relative_rms < item.relative_rms:
            kept[key] = item
    return list(kept.values())


def _run(what: str, spec: IoSpec, candidate: OnnxRunner, case: Case) -> Arrays:
    try:
        if case.steps_after is not None:
            return run_in_steps(candidate, spec, case)
        return candidate.run(case.inputs)
    except Exception as error:  # ONNX Runtime's errors have no class in common
        raise GateFailed(f"{what}: case {case.name} does not run: {str(error).splitlines()[0][:300]}") from error


def _check_difference(what: str, found: Difference, tolerance: Tolerance) -> None:
    for name, limit in (("max_abs", tolerance.max_abs), ("relative_rms", tolerance.relative_rms)):
        value = getattr(found, name)
        if limit is not None and not value <= limit:
            raise GateFailed(
                f"{what}: case {found.case}, output {found.output}: {name} {value:.3g}; largest difference "
                f"{found.max_abs:.3g} at position {found.position}",
                f"{name} at most {limit:g}",
            )

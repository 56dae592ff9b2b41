"""The gate between a model and its exported form: same signature, same numbers on real text in many shapes.
Which text and which shapes is `cases`' business; what happens to a model that fails is the stage's.

Shape letters: B batch, T sequence length, V vocabulary (or classes), N compared positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.cases import Case
from export.io_spec import SEQUENCE, IoSpec, Port
from export.runners import Arrays, OnnxRunner
from trainer.errors import GateFailed
from trainer.export_config import Tolerance


@dataclass(frozen=True)
class Difference:
    """How one output of one case differs from the source's, on positions that are not padding."""

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
        return self.agreeing / self.positions


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
        actual = _run(what, candidate, case)
        for port in spec.outputs:
            found.append(compare(what, case, port, source[port.name], actual[port.name]))
            _check_difference(what, found[-1], tolerance)
    top1 = sum(item.agreeing for item in found) / sum(item.positions for item in found)
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
            "positions": sum(item.positions for item in found),
            "max_abs": max(item.max_abs for item in found),
            "relative_rms": max(item.relative_rms for item in found),
            "top1": top1,
        },
        "thresholds": tolerance.model_dump(),
        "cases": [
            {"case": i.case, "output": i.output, "max_abs": i.max_abs, "relative_rms": i.relative_rms, "top1": i.top1}
            for i in found
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
    """The difference of one output, [B, T, V] on unmasked positions or [B, V] on all rows.

    Raises GateFailed for another shape or a value that is not finite.
    """
    if source.shape != actual.shape:
        raise GateFailed(f"{what}: case {case.name}, output {port.name}: shape {actual.shape}", f"shape {source.shape}")
    compared = case.mask_BT if SEQUENCE in port.axes else np.ones(source.shape[:1], dtype=bool)
    source_NV, actual_NV = source[compared].astype(np.float64), actual[compared].astype(np.float64)
    positions = np.argwhere(compared)
    if not np.isfinite(actual_NV).all():
        row, column = np.argwhere(~np.isfinite(actual_NV))[0]
        where = (*positions[row].tolist(), int(column))
        raise GateFailed(f"{what}: case {case.name}, output {port.name}, position {where}: {actual_NV[row, column]}")
    difference_NV = np.abs(actual_NV - source_NV)
    row, column = np.unravel_index(int(difference_NV.argmax()), difference_NV.shape)
    return Difference(
        case=case.name,
        output=port.name,
        max_abs=float(difference_NV.max()),
        position=(*positions[row].tolist(), int(column)),
        squared_error=float(np.square(difference_NV).sum()),
        squared_source=float(np.square(source_NV).sum()),
        agreeing=int((source_NV.argmax(axis=1) == actual_NV.argmax(axis=1)).sum()),
        positions=len(positions),
    )


def _run(what: str, candidate: OnnxRunner, case: Case) -> Arrays:
    try:
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

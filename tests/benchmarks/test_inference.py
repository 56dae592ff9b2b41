"""What the latency benchmark may call its result: only rows that the gate of a recipe's defaults would let out."""

import inference
import pytest
from inference import Variant, describe, headline

from export.windows import Window

FINE = {"cases": 7, "positions": 600, "max_abs": 1e-6, "relative_rms": 1e-6, "top1": 1.0}
WINDOWS = {"eager": 0.2, "onnx_fp32": 0.1, "onnx_int8": 0.02}


def rows(int8):
    """Rows of one head, its student's int8 with these figures of parity."""
    proofs = {("student", "parity_fp32"): FINE, ("student", "parity_int8"): FINE | int8}
    teacher = [Window((0.2,), 1.0)] * 3
    variants = [Variant("student", backend, inference.Path("x")) for backend in WINDOWS]
    taken = [[Window((WINDOWS[variant.backend],), 1.0)] * 3 for variant in variants]
    return {"rows": [describe(one, its, teacher, proofs) for one, its in zip(variants, taken, strict=True)]}


@pytest.mark.parametrize(
    ("int8", "passes"),
    [
        ({}, True),
        ({"relative_rms": 0.099, "top1": 0.91}, True),
        ({"relative_rms": 0.11}, False),
        ({"top1": 0.89}, False),
    ],
)
def test_rows_say_whether_the_shipped_gate_lets_them_out(int8, passes):
    by_backend = {row["backend"]: row["passes_shipped_gate"] for row in rows(int8)["rows"]}
    assert by_backend == {"eager": True, "onnx_fp32": True, "onnx_int8": passes}


def test_the_headline_is_of_a_row_that_passes():
    first, second = inference.HEADS
    good, bad = rows({}), rows({"relative_rms": 0.2})
    found = headline({first: good, second: bad})
    assert (found["head"], found["backend"], found["speedup"]) == (first, "onnx_int8", pytest.approx(10.0))
    found = headline({first: bad, second: good})  # the first head leads, with what passes there
    assert (found["head"], found["backend"], found["speedup"]) == (first, "onnx_fp32", pytest.approx(2.0))
    for row in bad["rows"]:
        row["passes_shipped_gate"] = False
    assert headline({first: bad, second: bad}) is None


def test_exports_are_made_on_the_shapes_of_the_shipped_gate():
    shipped = {form: getattr(inference.SHIPPED, form) for form in ("int8", "int8_static")}
    assert inference.LOOSE.model_copy(update=shipped) == inference.SHIPPED
    assert inference.LOOSE.int8.relative_rms > inference.SHIPPED.int8.relative_rms

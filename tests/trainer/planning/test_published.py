"""The plan's formulas against published figures; bounds are those that hold, misses are named."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "plan_against_published.py"
# By kind, the largest error in per cent that is seen, rounded up.
BOUNDS = {"memory: activations": 0.2, "parameters": 0.0, "MFU": 1.2, "TFLOP/s": 2.7}
# DeepSpeed's estimator counts by other rules at these stages; the notes of the points say which.
OTHER_RULES = {"DeepSpeed estimator, T5-3b on 8 GPUs, zero2": -29.2, "DeepSpeed estimator, T5-3b on 8 GPUs, zero3": 8.9}


@pytest.fixture(scope="module")
def published():
    spec = importlib.util.spec_from_file_location("plan_against_published", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_zero_table_to_the_printed_digit(published):
    for point in published.zero_table():
        assert round(point.ours, 1) == point.published


def test_errors_stay_within_what_is_stated(published):
    points = published.points()
    assert sum(point.kind in ("MFU", "TFLOP/s") for point in points) >= 8
    for point in points:
        if point.what in OTHER_RULES:
            assert point.error_percent == pytest.approx(OTHER_RULES[point.what], abs=0.1)
            assert point.note
        else:
            bound = BOUNDS.get(point.kind, 1.5)  # of states, printed to a tenth of a GB
            assert abs(point.error_percent) <= bound, point


def test_published_micro_batches_are_let_through(published):
    """Where they are not, the plan is too careful by less than a quarter: their loss keeps fewer logits."""
    ran = published.micro_batches()
    assert sum(one.allowed for one in ran) >= 15
    assert all(one.largest >= 0.75 * one.published for one in ran)
    by_name = {one.what: one for one in ran}
    assert by_name["MPT-7b, 8 x a100-80, T 2048"].largest == 6  # the one they ran


def test_a_wrong_formula_would_be_seen(published, monkeypatch):
    monkeypatch.setattr(published, "flops_per_token", lambda shape, length, share=1.0: 6.0 * shape.parameters().total)
    errors = [point.error_percent for point in published.points() if point.kind == "MFU"]
    assert max(map(abs, errors)) > 5 * BOUNDS["MFU"]


def test_the_written_result_is_of_this_code(published):
    written = json.loads(published.RESULT.read_text(encoding="utf-8"))
    assert [point["ours"] for point in written["points"]] == pytest.approx([point.ours for point in published.points()])
    assert [one["largest"] for one in written["micro_batches"]] == [one.largest for one in published.micro_batches()]

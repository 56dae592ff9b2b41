"""Measured twice: the larger of all differences is the noise, and what lies within it has no order."""

import pytest

from export.noise import compare, difference, rank


def row(length, p50_ms, status="ok"):
    return {"batch_size": 1, "sequence_length": length, "lengths": "full", "status": status, "p50_ms": p50_ms}


def test_the_largest_difference_of_shapes_that_are_stable_twice():
    first = [row(8, 1.0), row(16, 2.0), row(32, 4.0), row(64, 8.0, "unstable")]
    again = [row(8, 1.1), row(16, 1.6), row(32, 40.0, "unstable"), row(64, 80.0)]
    found = compare(first, again)
    assert found["relative"] == pytest.approx(0.25)  # 2.0 against 1.6, relative to the shorter
    assert [(shape["sequence_length"], shape["again_ms"]) for shape in found["shapes"]] == [(8, 1.1), (16, 1.6)]


def test_a_row_is_not_compared_with_one_of_other_lengths():
    assert compare([row(8, 1.0)], [row(8, 1.0) | {"lengths": "real"}]) == {"relative": None, "shapes": []}


def test_a_difference_has_no_direction():
    assert difference(2.0, 3.0) == difference(3.0, 2.0) == pytest.approx(0.5)


def test_places_count_only_those_that_are_faster_beyond_the_noise():
    values = [10.0, 10.4, 12.0, 12.5]
    assert [rank(value, values, 0.05) for value in values] == [(1, True), (1, True), (3, True), (3, True)]
    assert [rank(value, values, 0.0) for value in values] == [(1, False), (2, False), (3, False), (4, False)]
    assert rank(5.0, [5.0, 5.0], 0.0) == (1, True)

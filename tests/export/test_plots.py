"""The pictures draw what was measured: their data is read back from matplotlib's own objects."""

import numpy as np
import pytest

from export import plots
from export.plots import pareto_front, quality_points, smooth
from export.results import read_results
from tests.export.synthetic_run import bench, bench_report, build, make_recipe, pretrain


@pytest.fixture
def recipe(tmp_path):
    return build(tmp_path / "demo")


def bars(axes):
    """(place, height) of each bar, left to right, without those that only make the legend."""
    patches = [p for p in axes.patches if p.get_height() > 0]
    return sorted((round(p.get_x() + p.get_width() / 2, 3), round(p.get_height(), 6)) for p in patches)


def lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def test_loss_curves(recipe):
    (axes,) = plots.loss(read_results(recipe)).axes
    drawn = lines(axes)
    teacher = drawn["teacher, validation"]
    assert teacher.tolist() == [[0, 9.0], [20_000, 5.0], [40_000, 2.5]]
    student = drawn["student, training (smoothed)"]
    assert student[0, 1] == pytest.approx(6.0 - 0.07)  # its cross entropy, not the weighted sum (39.5)
    assert student[-1, 0] == 40_000
    assert student[:, 1].max() < 6.0


def test_a_student_without_the_hard_term_has_no_training_curve(recipe):
    path = recipe.stage_dir("distill") / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss_hard"', '"hard"'))
    (axes,) = plots.loss(read_results(recipe)).axes
    assert "student, training (smoothed)" not in lines(axes)
    assert "student, validation" in lines(axes)


def test_a_loss_that_was_no_number_leaves_a_gap(recipe):
    path = recipe.stage_dir("pretrain") / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 8.85,', '"loss": null,'))
    (axes,) = plots.loss(read_results(recipe)).axes
    assert len(lines(axes)["teacher, training (smoothed)"]) == 39


def test_latency_has_a_panel_for_each_shape(recipe):
    panels = [axes for axes in plots.latency(read_results(recipe)).axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in panels] == [
        "batch 1 × 32 tokens", "batch 1 × 128 tokens", "batch 8 × 128 tokens"
    ]  # fmt: skip
    heights = [height for _, height in bars(panels[1])]
    assert heights == [12.0, 6.5, 11.0, 6.0, 8.0, 4.0, 3.0, 1.5]


def test_refused_and_failed_rows_have_no_bar_even_with_a_number(recipe):
    def change(row):
        if row["backend"] == "compile":
            row["status"] = "refused"
        if (row["model"], row["backend"]) == ("student", "eager"):
            row["status"] = "unstable"

    bench(recipe, change)
    panel = plots.latency(read_results(recipe)).axes[1]
    assert [height for _, height in bars(panel)] == [12.0, 6.5, 8.0, 4.0, 3.0, 1.5]
    assert [text.get_text() for text in panel.texts].count("refused") == 2
    places = [text.get_position()[0] for text in panel.texts if text.get_text() == "refused"]
    assert all(panel.get_xlim()[0] < place < panel.get_xlim()[1] for place in places)
    assert [patch.get_hatch() for patch in panel.patches].count("///") == 1


def test_statuses_of_the_outermost_backends_are_within_the_picture(recipe):
    bench(recipe, lambda row: row.update(status="failed") if row["backend"] in ("eager", "onnx_int8") else None)
    panel = plots.latency(read_results(recipe)).axes[0]
    left, right = panel.get_xlim()
    assert all(left < text.get_position()[0] < right for text in panel.texts)


def test_no_picture_without_figures(tmp_path):
    recipe = make_recipe(tmp_path / "demo")
    pretrain(recipe)
    found = read_results(recipe)
    assert plots.latency(found) is plots.quality(found) is plots.size(found) is None
    assert set(plots.draw_all(found, tmp_path)) == {"loss", "throughput"}


def test_load_is_the_99th_percentile_against_the_rate(recipe):
    (axes,) = plots.load(read_results(recipe)).axes
    drawn = lines(axes)
    assert drawn["student onnx int8"].tolist() == [[320.0, 11.0], [480.0, 31.0], [560.0, 93.0]]
    assert set(drawn["limit, 50 ms"][:, 1]) == {50.0}
    never = bench_report()["load"]
    never[0]["points"] = [point | {"p99_ms": None} for point in never[0]["points"]]
    bench(recipe, load=never)
    assert plots.load(read_results(recipe)) is None


def test_size_takes_each_model_and_backend_once(recipe):
    (axes,) = plots.size(read_results(recipe)).axes
    assert [height for _, height in bars(axes)] == [44.0, 22.0, 44.0, 22.0, 44.0, 22.0, 12.0, 6.0]


def test_pareto_front_by_hand(recipe):
    points = quality_points(read_results(recipe))
    front = [(point["model"], point["backend"]) for point in pareto_front(points)]
    # 1.5 ms at 0.395, 3 ms at 0.415, 8 ms at 0.42; the student's 4 ms at 0.40 is beaten by the teacher's int8
    assert front == [("student", "onnx_int8"), ("teacher", "onnx_int8"), ("teacher", "onnx_fp32")]


def test_pareto_front_where_lower_is_better():
    def point(ms, value):
        return {"model": "m", "backend": "b", "ms": ms, "metric": "perplexity", "value": value}

    points = [point(1.0, 20.0), point(2.0, 25.0), point(3.0, 10.0), point(3.0, 9.0), point(4.0, 9.0)]
    assert [(p["ms"], p["value"]) for p in pareto_front(points)] == [(1.0, 20.0), (3.0, 9.0)]


def test_points_within_the_noise_of_each_other_are_judged_by_quality_alone():
    def point(ms, value):
        return {"model": "m", "backend": "b", "ms": ms, "metric": "masked_accuracy", "value": value}

    points = [point(1.0, 0.3), point(1.05, 0.4), point(2.0, 0.5)]
    assert pareto_front(points) == points
    assert pareto_front(points, noise=0.06) == points[1:]
    assert pareto_front([point(1.0, 0.4), point(1.05, 0.4)], noise=0.06) == [point(1.0, 0.4), point(1.05, 0.4)]


def test_unverified_and_unstable_rows_are_no_points(recipe):
    (recipe.stage_dir("export") / "student" / "model.onnx").write_bytes(b"another")

    def change(row):
        if (row["model"], row["backend"]) == ("teacher", "compile"):
            row["status"] = "unstable"

    bench(recipe, change)
    points = {(point["model"], point["backend"]) for point in quality_points(read_results(recipe))}
    everything = {(row["model"], row["backend"]) for row in bench_report()["rows"]}
    assert everything - points == {("student", "onnx_fp32"), ("teacher", "compile")}


def test_smoothing_keeps_a_constant_and_the_length():
    assert smooth(np.full(500, 3.0)) == pytest.approx(np.full(500, 3.0))
    assert len(smooth(np.arange(3.0))) == 3
    noisy = 2.0 + np.random.default_rng(0).normal(size=2000)
    assert smooth(noisy)[500:].std() < 0.25 * noisy.std()
    assert len(smooth(np.array([]))) == 0


def test_models_keep_their_colours(recipe):
    assert plots._colour("teacher") != plots._colour("student")
    assert plots._colour("some other") == plots._colour("some other")

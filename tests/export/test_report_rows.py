"""Benchmark rows on the page: places within the noise, ties, older reports, real lengths, where nodes ran."""

import json

import pytest

from export.report import describe_rows
from export.results import read_results, summarize
from tests.export.synthetic_run import bench, build
from tests.export.test_report import report, text_of


def noise(relative):
    return {"model": "teacher", "backend": "eager", "relative": relative, "shapes": [], "reason": ""}


def test_rows_within_the_noise_share_their_place(tmp_path, capsys):
    """At 1 x 128: 1.5, 3, 4, 6, 6.5, 8, 11, 12 ms. With 40 % of noise 4 is not slower than 3, nor 8 than 6."""
    recipe = build(tmp_path / "demo")
    bench(recipe, noise=noise(0.4))
    found = read_results(recipe)
    places = {row["p50_ms"]: row["rank"] for row in describe_rows(found) if row["shape"] == "1 × 128"}
    assert places == {1.5: "1", 3.0: "2, tied", 4.0: "2, tied", 6.0: "4, tied", 6.5: "4, tied", 8.0: "4, tied",
                      11.0: "6, tied", 12.0: "7, tied"}  # fmt: skip
    assert "measured twice in two processes, differed from itself by up to 40.0%" in text_of(report(recipe, capsys)[1])


def test_a_best_backend_within_the_noise_of_another_is_called_tied(tmp_path, capsys):
    recipe = build(tmp_path / "demo")

    def change(row):
        if (row["model"], row["backend"]) == ("student", "onnx_fp32"):
            row["p50_ms"] = row["p50_ms"] * 1.55 / 4

    bench(recipe, change)
    summary, page, _ = report(recipe, capsys)
    assert (summary["student_backend"], summary["tied_backends"]) == ("onnx_int8", ["onnx_fp32"])
    assert "student in onnx int8 (tied with onnx fp32) against teacher" in text_of(page)
    bench(recipe, change, noise=noise(0.01))
    assert summarize(read_results(recipe))["tied_backends"] == []


def test_a_student_within_the_noise_of_its_teacher_is_no_faster(tmp_path, capsys):
    recipe = build(tmp_path / "demo")
    bench(recipe, noise=noise(9.0))
    summary, _, shown = report(recipe, capsys)
    assert summary["tied"] is True
    assert "8.0× (within the noise)" in shown


def test_an_older_report_is_shown_unranked_and_says_what_to_run(tmp_path, capsys):
    """As bench wrote it before it measured anything twice, the machine, generating and load."""
    recipe = build(tmp_path / "demo")
    path = recipe.stage_dir("bench") / "report.json"
    old = json.loads(path.read_text())
    for part in ("noise", "rates", "decode", "load"):
        del old[part]
    path.write_text(json.dumps(old))
    summary, page, _ = report(recipe, capsys)
    assert (summary["speedup"], summary["noise"], summary["tied"], summary["tied_backends"]) == (8.0, None, None, None)
    assert {row["rank"] for row in describe_rows(read_results(recipe))} == {""}
    assert "so rows are not ranked; to rank them run bench again" in text_of(page)
    assert "measured by an older lmworks" in text_of(page)
    assert "Under load" not in page and "Generating" not in page


def test_rows_of_real_lengths_are_shown_but_not_compared(tmp_path, capsys):
    """Batches of real documents are other work than full ones: faster, for having less to do."""
    recipe = build(tmp_path / "demo")

    def change(row):
        if (row["backend"], row["sequence_length"]) == ("onnx_int8", 128):
            row.update(lengths="real", padded_tokens_per_s=5000.0)

    bench(recipe, change)
    summary, page, _ = report(recipe, capsys)
    assert (summary["student_backend"], summary["student_latency_ms"]) == ("onnx_fp32", 4.0)
    assert "student onnx int8 8 × 128 real ok 1 " in text_of(page)
    assert "real tokens/s padded tokens/s start s" in text_of(page)


def test_the_page_says_where_nodes_ran(tmp_path, capsys):
    recipe = build(tmp_path / "demo")
    bench(recipe, lambda row: row.update(nodes={"CUDAExecutionProvider": 40, "CPUExecutionProvider": 3}))
    assert "teacher onnx int8: 40 on CUDAExecutionProvider, 3 on CPUExecutionProvider;" in text_of(
        report(recipe, capsys)[1]
    )


def test_joules_are_on_the_page_where_they_were_measured_and_else_why_not(tmp_path, capsys):
    recipe = build(tmp_path / "demo")
    _, page, _ = report(recipe, capsys)
    assert "J/request" not in page and "No energy" not in page
    bench(recipe, lambda row: row.update(joules_per_request=0.25, joules_per_token=0.125),
          no_energy=[{"model": "teacher", "backend": "eager", "reason": "NVML: Not Supported"}])  # fmt: skip
    summary, page, _ = report(recipe, capsys)
    assert (summary["teacher_joules"], summary["student_joules"]) == (0.25, 0.25)
    assert "file MiB J/request J/real token of limit" in text_of(page) and "No energy: NVML: Not Supported." in page


@pytest.mark.parametrize(("parity", "verified"), [({"max_abs": 1e-6}, True), (None, False)])
def test_an_engine_s_row_counts_where_its_graph_and_its_own_numbers_were_proven(parity, verified, tmp_path):
    recipe = build(tmp_path / "demo")

    def change(row):
        if row["backend"] == "onnx_fp32":
            row.update(backend="tensorrt_fp32", engines=[{"parity": {"max_abs": 1e-6}}, {"parity": parity}])

    bench(recipe, change)
    rows = describe_rows(read_results(recipe))
    assert {row["verified"] for row in rows if row["backend"] == "tensorrt_fp32"} == {verified}

"""The report of run folders that are whole, partial, shaky or hostile: its numbers against ones worked out by hand."""

import base64
import html
import json
import re
import shutil
import sys

import pytest

from export import plots
from export.report import commands, duration, lineage, number, run, stage_command
from export.results import read_metrics, read_results, summarize
from tests.export import synthetic_run
from tests.export.synthetic_run import (
    bench,
    build,
    distill,
    eval_row,
    export,
    make_recipe,
    prepare,
    pretrain,
    train_row,
    write_metrics,
)
from trainer.artifact import content_hash, write_artifact
from trainer.errors import UserError
from trainer.recipe_file import dump_recipe

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = "<script>alert('x')</script> & \"q\" | `c` $x$ [a](b)"


def report(recipe, capsys):
    """Run the stage; summary, page, and what a terminal shows."""
    run(recipe)
    summary = json.loads((recipe.run_dir / "summary.json").read_text())
    return summary, (recipe.run_dir / "report.html").read_text(), capsys.readouterr().out


def text_of(page: str) -> str:
    without = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", without)).split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    recipe = build(tmp_path_factory.mktemp("whole") / "demo")
    run(recipe)
    return recipe


def test_summary_of_a_whole_run(whole):
    assert json.loads((whole.run_dir / "summary.json").read_text()) == {
        "teacher_loss": 2.5,
        "student_loss": 2.75,
        "teacher_parameters": 11_000_000,
        "student_parameters": 5_500_000,
        "teacher_latency_ms": 12.0,  # eager, though its int8 takes 3.0
        "student_latency_ms": 1.5,  # the best of 6.5, 6.0, 4.0 and 1.5
        "speedup": 8.0,
        "noise": 0.05,
        "tied": False,
        "stable": True,
        "student_backend": "onnx_int8",
        "tied_backends": [],
        "batch_size": 1,
        "sequence_length": 128,
        "threads": 2,
        "parity_passed": True,
        "seconds": 150.0,  # 100 + 50
        "teacher_mib": 44.0,
        "student_mib": 6.0,
        "quality": {"metric": "masked_accuracy", "teacher": 0.42, "student": pytest.approx(0.395)},
    }


def test_five_lines_and_the_path(tmp_path, capsys):
    recipe = build(tmp_path / "demo")
    _, _, shown = report(recipe, capsys)
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["loss", "parameters", "latency", "speed-up", "size"]
    assert "2.5 → 2.75" in lines[0] and "11.0 M → 5.50 M" in lines[1] and "12 → 1.5 ms" in lines[2]
    assert "8.0×" in lines[3] and "at 94.0% of its masked accuracy" in lines[3]  # 0.395 / 0.42
    assert "44 → 6 MiB" in lines[4]
    assert lines[5:] == [str(recipe.run_dir / "report.html")]


def test_page_stands_alone(whole):
    page = (whole.run_dir / "report.html").read_text()
    assert "<script" not in page and "<link" not in page and "http://" not in page and "https://" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 6
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(PNG)
    assert {path.name for path in (whole.run_dir / "plots").iterdir()} == {
        "loss.png", "throughput.png", "latency.png", "quality.png", "size.png", "load.png"
    }  # fmt: skip


def test_page_shows_what_was_measured(whole):
    shown = text_of((whole.run_dir / "report.html").read_text())
    for expected in ("99.0% of masked accuracy (97.5% to 100.7%) [99.0%]",
                     "8.0×", "12 → 1.5 ms", "970", "300,000", "duplicate 10", "resumed at step 20", "1 min 40 s",
                     "student onnx int8 1 × 128 ok 1 1.5 1.65 1.95 400", "Test CPU, 2 threads",
                     "0.25 300 6 25% compute", "student onnx int8 1 × 32 + 16 ok 8.25 2.125 444 38% memory",
                     "150 GFLOP/s in fp32 products, 600 Gop/s in int8 products, 25 GB/s in copies",
                     "student onnx int8 ok 480 4 31 1,000 1.5 yes, the highest that does",
                     "student onnx int8 ok 560 4 93 1,000 1.5 no", "student onnx int8 640 requests/s",
                     "2 min 30 s", "lmworks pretrain quickstart pretrain.max_steps=40"):  # fmt: skip
        assert expected in shown, expected


def test_same_results_give_the_same_bytes(whole):
    before = {path: path.read_bytes() for path in whole.run_dir.glob("plots/*.png")}
    page = (whole.run_dir / "report.html").read_bytes()
    run(whole)
    assert {path: path.read_bytes() for path in whole.run_dir.glob("plots/*.png")} == before
    assert (whole.run_dir / "report.html").read_bytes() == page


# ---- the log ---------------------------------------------------------------------------------------------------


def test_rows_that_a_resume_superseded_are_dropped(tmp_path):
    pretrain(make_recipe(tmp_path))
    metrics = read_metrics(tmp_path / "pretrain" / "metrics.jsonl")
    assert [row["step"] for row in metrics.train] == list(range(1, 41))
    assert metrics.train[24]["loss"] == pytest.approx(6.0 - 0.08 * 5)  # step 25 of the second attempt, not 5.25
    assert [row["step"] for row in metrics.eval] == [0, 20, 40]
    assert metrics.resumed_at == (20,)


def test_a_fresh_start_drops_everything_before_it(tmp_path):
    rows = [{"event": "start", "step": 0}, eval_row(0, 9.0), train_row(1, 8.0), eval_row(4, 1.0)]
    rows += [{"event": "end", "step": 4, "seconds": 7.0}, {"event": "start", "step": 0}, eval_row(0, 8.5)]
    write_metrics(tmp_path, [*rows, train_row(1, 8.1)])
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in metrics.eval] == [(0, 8.5)]
    assert [row["loss"] for row in metrics.train] == [8.1]
    assert metrics.seconds is None  # the second attempt has not ended


def test_an_evaluation_done_again_at_the_resumed_step_counts_once(tmp_path):
    write_metrics(tmp_path, [{"event": "start", "step": 0}, eval_row(5, 3.0), train_row(7, 2.0),
                             {"event": "resume", "step": 5}, eval_row(5, 3.25)])  # fmt: skip
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["loss"] for row in metrics.eval] == [3.25]
    assert metrics.train == []


def test_a_line_cut_by_a_kill_does_not_hide_the_resume_that_follows_on_it(tmp_path):
    whole_rows = [{"event": "start", "step": 0}, train_row(1, 5.0), train_row(2, 4.0), train_row(3, 3.0)]
    lines = [json.dumps(row) for row in whole_rows]
    lines[3] = lines[3][:25] + json.dumps({"event": "resume", "step": 1})  # appended to half a line
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(train_row(2, 4.5)), '{"event": "tr']))
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in metrics.train] == [(1, 5.0), (2, 4.5)]
    assert metrics.unreadable == 2
    assert metrics.resumed_at == (1,)


def test_the_chains_seconds_rule_where_it_ran(tmp_path):
    recipe = build(tmp_path / "demo", stages=("prepare", "pretrain", "distill"))
    stages = {"prepare": {"seconds": 10.0, "skipped": True}, "pretrain": {"seconds": 120.0, "skipped": False}}
    (recipe.run_dir / "chain.json").write_text(json.dumps({"stages": stages}))
    assert summarize(read_results(recipe))["seconds"] == 180.0  # 10 + 120 of the chain, 50 of the stage itself


def test_table_and_picture_give_the_same_median(tmp_path, capsys):
    recipe = build(tmp_path / "demo", stages=("pretrain",))
    rows = [{"event": "start", "step": 0}]
    rows += [train_row(step, 5.0) | {"tokens_per_s": 100.0 * step} for step in (1, 2, 3, 4)]
    write_metrics(recipe.stage_dir("pretrain"), rows)
    _, page, _ = report(recipe, capsys)
    assert "4,000 250 –" in text_of(page)
    label = plots.throughput(read_results(recipe)).axes[0].get_legend_handles_labels()[1][0]
    assert label == "teacher, median 250.0"


# ---- what is not there -----------------------------------------------------------------------------------------


def test_only_pretrained(tmp_path, capsys):
    recipe = build(tmp_path / "demo", stages=("prepare", "pretrain"))
    summary, page, shown = report(recipe, capsys)
    measured = {key for key, value in summary.items() if value is not None}
    assert measured == {"teacher_loss", "teacher_parameters", "seconds"}
    said = text_of(page)
    for stage in ("distill", "export", "bench"):
        assert f"{stage}: it has not run, or not finished, so its part is left out." in said
    assert "Speed, memory and size" not in page and "Export and parity" not in page
    assert {path.name for path in (recipe.run_dir / "plots").iterdir()} == {"loss.png", "throughput.png"}
    assert [line.split()[0] for line in shown.splitlines()[:-1]] == ["loss", "parameters"]
    assert shown.splitlines()[:2] == [
        "loss        2.5 → –  (teacher → student, nats per target token)",
        "parameters  11.0 M → –  (teacher → student)",
    ]


def test_a_stage_that_the_recipe_does_not_ask_for(tmp_path, capsys):
    recipe = make_recipe(tmp_path / "demo", without=("distill", "export", "bench"))
    prepare(recipe)
    pretrain(recipe)
    _, page, _ = report(recipe, capsys)
    assert "distill: the recipe has no such section, so its part is left out." in text_of(page)


def test_a_stage_in_the_middle_of_its_run(tmp_path, capsys):
    recipe = build(tmp_path / "demo", stages=("prepare", "pretrain", "distill"))
    shutil.rmtree(recipe.model_dir("distill"))
    write_metrics(recipe.stage_dir("distill"), [{"event": "start", "step": 0}, train_row(3, 20.0, loss_hard=6.0)])
    summary, page, _ = report(recipe, capsys)
    assert summary["student_loss"] is None and summary["student_parameters"] is None
    assert "distill: not finished; what is shown ends at its last logged step." in text_of(page)


def test_before_bench_nothing_is_said_of_speed(tmp_path, capsys):
    recipe = build(tmp_path / "demo", stages=("prepare", "pretrain", "distill", "export"))
    summary, page, said = report(recipe, capsys)
    assert summary["speedup"] is None and "None ×" not in text_of(page)
    assert "Speed-up" not in text_of(page) and "speed-up" not in said and "Validation loss" in text_of(page)


def test_bench_alone(tmp_path, capsys):
    recipe = make_recipe(tmp_path / "demo")
    bench(recipe)
    summary, _, _ = report(recipe, capsys)
    assert summary["teacher_latency_ms"] == 12.0
    assert summary["student_backend"] == "compile"  # no ONNX file is there whose parity could be shown
    assert summary["student_latency_ms"] == 6.0
    assert summary["speedup"] == 2.0
    assert summary["parity_passed"] is None
    assert summary["teacher_parameters"] == 11_000_000
    assert summary["teacher_loss"] is None


def test_nothing_at_all_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match="demo has no results"):
        run(make_recipe(tmp_path / "demo"))


def test_old_pictures_do_not_outlive_their_results(tmp_path, capsys):
    recipe = build(tmp_path / "demo")
    report(recipe, capsys)
    shutil.rmtree(recipe.stage_dir("bench"))
    _, page, _ = report(recipe, capsys)
    assert {path.name for path in (recipe.run_dir / "plots").iterdir()} == {"loss.png", "throughput.png"}
    assert "Median latency by model" not in page


# ---- rows that must not be believed ----------------------------------------------------------------------------


def unstable(*pairs):
    def change(row):
        if (row["model"], row["backend"]) in pairs:
            row.update(status="unstable", reason="medians differ by 30%")

    return change


def test_an_unstable_row_yields_to_a_stable_one(tmp_path):
    recipe = build(tmp_path / "demo")
    bench(recipe, unstable(("student", "onnx_int8")))
    summary = summarize(read_results(recipe))
    assert (summary["student_backend"], summary["student_latency_ms"], summary["speedup"]) == ("onnx_fp32", 4.0, 3.0)
    assert summary["stable"] is True


def test_only_unstable_rows_are_taken_and_marked(tmp_path, capsys):
    recipe = build(tmp_path / "demo")
    bench(recipe, unstable(*[("student", name) for name in ("eager", "compile", "onnx_fp32", "onnx_int8")]))
    summary, page, shown = report(recipe, capsys)
    assert (summary["student_backend"], summary["speedup"], summary["stable"]) == ("onnx_int8", 8.0, False)
    assert "unstable, not to be relied on" in shown
    assert "student onnx int8 unstable" in text_of(page) and "medians differ by 30%" in text_of(page)


def test_an_unstable_teacher_marks_the_speed_up_too(tmp_path):
    recipe = build(tmp_path / "demo")
    bench(recipe, unstable(("teacher", "eager")))
    assert summarize(read_results(recipe))["stable"] is False


def test_refused_and_failed_rows_are_never_numbers(tmp_path, capsys):
    """Not even where a bench left a number in such a row."""
    recipe = build(tmp_path / "demo")

    def change(row):
        if row["backend"] == "onnx_int8":
            row.update(status="refused", reason="no parity evidence", p50_ms=0.12345)
        if (row["model"], row["backend"]) == ("teacher", "eager"):
            row.update(status="failed", reason="RuntimeError: out of memory", p50_ms=0.54321)

    bench(recipe, change)
    summary, page, _ = report(recipe, capsys)
    assert summary["teacher_latency_ms"] is None and summary["speedup"] is None
    assert (summary["student_backend"], summary["student_latency_ms"]) == ("onnx_fp32", 4.0)
    assert "0.1234" not in page and "0.5432" not in page
    said = text_of(page)
    assert "teacher eager failed: RuntimeError: out of memory" in said
    assert "student onnx int8 1 × 128 refused" + 11 * " –" in said


def test_unstable_rows_without_numbers(tmp_path, capsys):
    recipe = build(tmp_path / "demo")

    def change(row):
        row.update(status="unstable", reason="others used the CPU")
        for key in ("p50_ms", "p90_ms", "p99_ms", "samples_per_s", "real_tokens_per_s"):
            del row[key]

    bench(recipe, change)
    summary, page, _ = report(recipe, capsys)
    assert (summary["teacher_latency_ms"], summary["speedup"], summary["stable"]) == (None, None, None)
    assert "bench: no row is stable; its latencies must not be relied on." in text_of(page)
    assert not (recipe.run_dir / "plots" / "latency.png").exists()


def test_a_file_changed_after_its_parity_is_not_verified(tmp_path, capsys):
    recipe = build(tmp_path / "demo")
    (recipe.stage_dir("export") / "student" / "model_quantized.onnx").write_bytes(b"another")
    summary, page, _ = report(recipe, capsys)
    assert summary["parity_passed"] is False
    assert (summary["student_backend"], summary["student_latency_ms"]) == ("onnx_fp32", 4.0)
    assert "no evidence for this file" in page and "(parity not shown)" in page


@pytest.mark.parametrize(
    ("replaced", "outdated", "seen"),
    [
        ("model", {"eager", "compile"}, (12.0, None, None)),  # its exports are of the old one
        ("export", {"onnx_fp32", "onnx_int8"}, (12.0, 6.0, "compile")),
    ],
)
def test_rows_of_a_model_that_was_replaced_are_outdated(tmp_path, capsys, replaced, outdated, seen):
    recipe = build(tmp_path / "demo")
    if replaced == "model":
        (recipe.model_dir("distill") / "model.safetensors").write_bytes(b"trained again")
        write_artifact(recipe.model_dir("distill"), "model", recipe_sha256="", parents={}, about={"parameters": 3})
    else:
        (recipe.stage_dir("export") / "student" / "config.json").write_text("{}")
        record = json.loads((recipe.stage_dir("export") / "student" / "artifact.json").read_text())
        write_artifact(recipe.stage_dir("export") / "student", "onnx", recipe_sha256="", parents={},
                       evidence=record["evidence"])  # fmt: skip
    summary, page, _ = report(recipe, capsys)
    assert (summary["teacher_latency_ms"], summary["student_latency_ms"], summary["student_backend"]) == seen
    found = read_results(recipe).bench
    assert {row["backend"] for row in found["rows"] if row["status"] == "outdated"} == outdated
    assert not [entry for entry in found["quality"] if entry["model"] == "student" and entry["backend"] in outdated]
    assert f"the {replaced} was replaced after it was measured; run bench again" in page


def test_rows_without_a_record_of_what_was_measured_are_outdated(tmp_path):
    recipe = build(tmp_path / "demo")
    path = recipe.stage_dir("bench") / "report.json"
    old = json.loads(path.read_text())
    for model in old["models"].values():
        del model["sha256"]
    path.write_text(json.dumps(old))
    summary = summarize(read_results(recipe))
    assert (summary["teacher_latency_ms"], summary["speedup"], summary["student_mib"]) == (None, None, None)


def test_an_export_without_evidence_is_not_verified(tmp_path):
    recipe = build(tmp_path / "demo")
    path = recipe.stage_dir("export") / "student" / "artifact.json"
    record = json.loads(path.read_text())
    record["evidence"] = []
    path.write_text(json.dumps(record))
    summary = summarize(read_results(recipe))
    assert summary["parity_passed"] is False
    assert summary["student_backend"] == "compile"


def test_the_shape_compared_is_batch_1_and_the_longest_sequence(tmp_path):
    recipe = build(tmp_path / "demo")

    def change(row):  # the student has no stable row there: others must not stand in for it
        if row["model"] == "student" and (row["batch_size"], row["sequence_length"]) == (1, 128):
            row.update(status="failed", reason="x")

    bench(recipe, change)
    summary = summarize(read_results(recipe))
    assert (summary["batch_size"], summary["sequence_length"]) == (1, 128)
    assert (summary["teacher_latency_ms"], summary["student_latency_ms"], summary["speedup"]) == (12.0, None, None)


# ---- lineage and commands --------------------------------------------------------------------------------------


def test_lineage_goes_from_text_to_engine(whole):
    steps = {step["name"]: step for step in lineage(read_results(whole))}
    assert list(steps) == ["tokenizer", "token shards", "teacher", "student", "teacher as ONNX", "student as ONNX"]
    parents = {name: {p["name"]: p["sha256"] for p in step["parents"]} for name, step in steps.items()}
    sha = {name: step["sha256"] for name, step in steps.items()}
    assert parents["student"] == {"data": sha["token shards"], "tokenizer": sha["tokenizer"], "teacher": sha["teacher"]}
    assert parents["student as ONNX"] == {"model": sha["student"]}
    assert {p["where"] for step in steps.values() for p in step["parents"]} == {"here"}


def test_a_parent_that_was_replaced_is_told(tmp_path, capsys):
    recipe = build(tmp_path / "demo")
    (recipe.model_dir("pretrain") / "model.safetensors").write_bytes(b"trained again")
    write_artifact(recipe.model_dir("pretrain"), "model", recipe_sha256="", parents={}, about={"parameters": 3})
    _, page, _ = report(recipe, capsys)
    said = text_of(page)
    assert said.count("no longer in this run folder") == 2  # the student's teacher and the teacher's export


def test_a_teacher_given_by_path_is_no_lost_parent(tmp_path):
    other = build(tmp_path / "other", stages=("prepare", "pretrain"))
    recipe = make_recipe(tmp_path / "demo", without=("pretrain",))
    tree = recipe.model_dump(mode="json")
    tree["distill"]["teacher"] = str(other.model_dir("pretrain"))
    recipe = type(recipe).model_validate(tree)
    prepare(recipe)
    synthetic_run._model(recipe, "distill", "DistilBertForMaskedLM", "distilbert", 5, 2.0,
                         {"teacher": content_hash(other.model_dir("pretrain"))})  # fmt: skip
    (student,) = [step for step in lineage(read_results(recipe)) if step["name"] == "student"]
    assert {p["name"]: p["where"] for p in student["parents"]}["teacher"] == "given"


def test_commands_keep_recipe_and_overrides(whole, monkeypatch):
    found = read_results(whole)
    monkeypatch.setattr(sys, "argv", ["/x/bin/lmworks", "run", "quickstart", "seed=3", "run_dir=a b"])
    assert stage_command(found, "bench", "lmworks bench") == "lmworks bench quickstart seed=3 'run_dir=a b'"
    assert stage_command(found, "pretrain", "lmworks run quickstart seed=4") == "lmworks pretrain quickstart seed=4"
    launched = "accelerate launch --num_processes 2 -m trainer.pretrain r.yaml"
    assert stage_command(found, "pretrain", launched) == launched
    listed = dict(commands(found))
    assert listed["parity of the exported files"] == "lmworks export quickstart seed=3 'run_dir=a b'"
    monkeypatch.setattr(sys, "argv", ["/x/export/report.py", "r.yaml"])
    assert stage_command(found, "export", None) == "lmworks export r.yaml"


def test_commands_fall_back_to_the_saved_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = build(tmp_path / "demo", stages=("prepare", "pretrain"))
    (recipe.stage_dir("pretrain") / "recipe.yaml").write_text(dump_recipe(recipe))
    monkeypatch.setattr(sys, "argv", ["/x/pytest", "-q"])
    assert stage_command(read_results(recipe), "prepare", None) == "lmworks prepare demo/pretrain/recipe.yaml"


# ---- text ------------------------------------------------------------------------------------------------------


def test_hostile_names_are_shown_and_do_nothing(tmp_path, capsys):
    recipe = make_recipe(tmp_path / "<b>demo</b>", **{"export": {"models": {"teacher": None, "student": None}}})
    prepare(recipe, source=HOSTILE)
    for stage in (pretrain, distill, export):
        stage(recipe)

    def change(row):
        row["status"], row["reason"] = "failed", HOSTILE

    bench(recipe, change)
    _, page, _ = report(recipe, capsys)
    assert "<script" not in page and "<b>demo" not in page
    assert HOSTILE in html.unescape(page)


def test_hostile_model_names_do_not_break_the_pictures(tmp_path, capsys):
    recipe = make_recipe(tmp_path / "demo")
    bench(recipe)
    path = recipe.stage_dir("bench") / "report.json"
    path.write_text(path.read_text().replace('"model": "student"', '"model": "_$\\\\frac{<i>$"'))
    _, page, _ = report(recipe, capsys)
    assert "<i>" not in page
    assert (recipe.run_dir / "plots" / "latency.png").read_bytes().startswith(PNG)


def test_numbers_as_text():
    assert [number(v) for v in (None, 0, 3, 1234567, 0.000123456, 2.5, 12345.6)] == [
        "–", "0", "3", "1,234,567", "0.0001235", "2.5", "12,346"
    ]  # fmt: skip
    assert [duration(v) for v in (None, 4.25, 59.99, 60.0, 3725.0)] == [
        "–",
        "4.2 s",
        "60.0 s",
        "1 min 00 s",
        "1 h 02 min",
    ]

"""What `lmworks submit` writes and refuses, without a cluster: golden scripts, quoting, the chain, arrays."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slurm import commands, frozen, ledger, rank
from slurm.grid import elements
from slurm.script import StageJob, common, render
from slurm.site import Container, Site, load_site
from slurm.submit import STAGES, plan
from tests.slurm.drill import CASES, CHAINS
from trainer.__main__ import main
from trainer.artifact import alone_in
from trainer.engine.launch import release_signals, stop_requested, watch_signals
from trainer.errors import UserError
from trainer.recipe_file import load_recipe
from trainer.slurm_config import Job, Slurm

ROOT = Path(__file__).parents[2]
DRILL = ROOT / "tests" / "benchmarks" / "results" / "slurm_drill.json"
GOLDEN = Path(__file__).parent / "golden"
SITES = ("plain", "venv", "pyxis", "apptainer")


def stage_job(**changes) -> StageJob:
    job = StageJob(
        name="bert-pretrain",
        stage="pretrain",
        job=Job(nodes=4, min_nodes=2, memory_gib=200),
        slurm=Slurm(),
        gpus_per_node=0,
        workdir=Path("/home/ada/project"),
        folder=Path("/home/ada/project/runs/bert/slurm"),
        code=Path("/home/ada/project/runs/bert/slurm/code-0123456789ab"),
        python="/home/ada/venv/bin/python",
    )
    return dataclasses.replace(job, **changes)


HOSTILE = """it's "$(touch pwned)" `touch pwned` # %j; touch pwned &"""
HOSTILE_SITE = Site(
    account=HOSTILE,
    partition=HOSTILE,
    container=Container(kind="apptainer", image=HOSTILE, mounts=(HOSTILE,)),
    network_interface=HOSTILE,
    environment={"NCCL_DEBUG": HOSTILE},
)


def hostile_job(root: Path, **changes) -> StageJob:
    folder = root / HOSTILE.replace("/", "") / "slurm"
    return stage_job(name=HOSTILE, workdir=root, folder=folder, code=folder / "code", **changes)


def scripts() -> dict[str, str]:
    written = {name: render(stage_job(gpus_per_node=load_site(name).gpus_per_node), load_site(name)) for name in SITES}
    report = stage_job(name="bert-report", stage="report", job=Job())
    return written | {
        "report": render(report, load_site("venv")),
        "array": render(stage_job(elements=6), load_site("plain")),
        "hostile": render(hostile_job(Path("/home/ada")), HOSTILE_SITE),
    }


@pytest.mark.parametrize("name", [*SITES, "report", "array", "hostile"])
def test_golden_scripts(name, request):
    text, path = scripts()[name], GOLDEN / f"{name}.sbatch"
    if request.config.getoption("--write-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), "run pytest --write-golden if this is meant, and read the difference"


@pytest.mark.parametrize("name", [*SITES, "report", "array"])  # of the hostile one it asks whether that was meant
def test_shellcheck_finds_nothing(name, tmp_path):
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck: apt-get install shellcheck")
    (tmp_path / "script").write_text(scripts()[name])
    done = subprocess.run(["shellcheck", tmp_path / "script"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_hostile_names_reach_the_programs_as_they_are(tmp_path):
    """The values of a script, run by bash up to where the common part begins."""
    head = render(hostile_job(tmp_path), HOSTILE_SITE).split("# ---- from here on")[0]
    show = 'printf "%s\\0" "$recipe" "$NCCL_SOCKET_IFNAME" "$NCCL_DEBUG" "${container[@]}"'
    done = subprocess.run(["bash", "-c", head + show], cwd=tmp_path, capture_output=True, text=True, check=True)
    recipe, interface, debug, *container = done.stdout.split("\0")[:-1]
    assert recipe == str(tmp_path / HOSTILE / "slurm" / "recipe.yaml")
    assert interface == debug == HOSTILE
    assert container == [
        "apptainer", "exec", "--bind", str(tmp_path), "--bind", str(tmp_path / HOSTILE), "--bind", HOSTILE,
        "--pwd", str(tmp_path), HOSTILE,
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["a\nb", "a\\b", ""])
def test_what_cannot_be_quoted_is_refused(value):
    with pytest.raises(ValueError, match="account"):
        Site(account=value)


def test_a_site_file_is_read_as_strictly_as_a_recipe(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("acount: me\ngpus_per_node: many\ncontainer: {kind: pyxis}\n")
    with pytest.raises(UserError) as error:
        load_site(str(site))
    lines = str(error.value).splitlines()
    assert lines[0] == f"3 problems in site file {site}:"
    assert f"{site}:1: acount: unknown key; did you mean 'account'?" in lines[1]
    assert f"{site}:2: gpus_per_node" in lines[2] and "need an image" in lines[3]


def test_a_chain_asks_for_gpus_where_it_trains():
    jobs = plan(load_recipe("quickstart"), [], Site(gpus_per_node=1), 0)
    assert [(job.stage, job.gpus_per_node) for job in jobs] == [
        ("prepare", 0), ("pretrain", 1), ("distill", 1), ("export", 0), ("bench", 1), ("pack", 0), ("report", 0)
    ]  # fmt: skip
    assert set(STAGES) <= set(Slurm.model_fields)  # a job for all that `lmworks run` does
    assert [job.stage for job in plan(load_recipe("quickstart"), ["report", "prepare"], Site(), 0)] == [
        "prepare", "report"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretran"], "no stage 'pretran'"),
        (["slurm.pretrain.nodes=2"], "global_batch_size 32 on 2 x 1 ranks of micro_batch_size 32"),
        (["slurm.pretrain.min_nodes=2"], "min_nodes 2 is more than nodes 1"),
        (["slurm.prepare.nodes=2"], "prepare runs as one process"),
        (["--array", "seed"], "key=value,value"),
        (["--array", "seed=one,2"], "does not hold"),
        (["--site", "nowhere"], "no site 'nowhere'"),
    ],
)
def test_mistakes_are_one_message(words, said, capsys):
    assert main(["submit", "quickstart", "--dry-run", *words]) == 2
    assert said in capsys.readouterr().err


def test_every_number_of_nodes_that_the_job_may_get_must_divide_the_batch():
    words = ["pretrain.micro_batch_size=8", "slurm.pretrain.nodes=4", "slurm.pretrain.min_nodes=2"]
    with pytest.raises(UserError, match="on 3 x 1 ranks"):
        plan(load_recipe("quickstart", words), ["pretrain"], Site(), 0)


def test_dry_run_prints_scripts_and_writes_nothing(tmp_path, capsys):
    words = ["prepare", "--site", "venv", f"run_dir={tmp_path}/run", "report", "--dry-run"]
    assert main(["submit", "quickstart", *words]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("# ====")] == [
        "# ==== prepare.sbatch", "# ==== report.sbatch", "# ==== the end of every script"
    ]  # fmt: skip
    assert "#SBATCH --partition=cpu" in said and "--gres" not in said
    assert said.count(common()) == 1 and said.endswith(common() + "\n")
    assert list(tmp_path.iterdir()) == []


def test_readme_s_five_commands_hold(tmp_path, monkeypatch, capsys):
    commands = ROOT.joinpath("README.md").read_text().split("## On SLURM")[1].split("```")[1].strip().splitlines()
    assert len(commands) == 5
    copy, submit = commands[2].split(), commands[3].split()
    shutil.copy(ROOT / copy[1], tmp_path / copy[2])
    monkeypatch.chdir(tmp_path)
    assert submit[0] == "lmworks" and main([*submit[1:], "--dry-run"]) == 0
    assert "#SBATCH --nodes=2" in capsys.readouterr().out


def test_a_save_that_took_longer_than_the_notice_is_said_at_the_next_submission(tmp_path, monkeypatch, capsys):
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    (tmp_path / "run" / "slurm" / "pretrain.last_stop_s").write_text("121\n")
    (tmp_path / "run" / "slurm" / "pretrain-3.last_stop_s").write_text("130\n")  # of an array's element
    (tmp_path / "run" / "slurm" / "prepare.last_stop_s").write_text("119\n")
    (tmp_path / "run" / "slurm" / "distill.stopping").write_text("1790000000\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "quickstart", f"run_dir={tmp_path}/run"]) == 2
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: pretrain took 130 s to save at its last stop; slurm.notice_s is 120",
        "warning: distill was ended while it saved at its last stop; slurm.notice_s is 120",
    ]


def test_without_slurm_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "quickstart", f"run_dir={tmp_path}/run"]) == 2
    assert "no sbatch here" in capsys.readouterr().err
    assert main(["status", str(tmp_path)]) == 2
    assert main(["cancel", str(tmp_path)]) == 2
    assert "nothing was submitted" in capsys.readouterr().err


def test_an_array_is_the_product_of_its_axes():
    recipe = load_recipe("quickstart")
    cells = elements(recipe, ["seed=0,1", "pretrain.optim.learning_rate=1e-3,3e-4"])
    assert [cell.name for cell in cells][2] == "seed=1 pretrain.optim.learning_rate=1e-3"
    assert [(cell.recipe.seed, cell.recipe.pretrain.optim.learning_rate) for cell in cells] == [
        (0, 1e-3), (0, 3e-4), (1, 1e-3), (1, 3e-4)
    ]  # fmt: skip
    with pytest.raises(UserError, match="all elements are jobs of one shape"):
        elements(recipe, ["slurm.max_restarts=1"])
    assert cells[3].recipe.run_dir == Path("runs/quickstart/array/3")


FAKE_SBATCH = """#!/bin/sh
case "$*" in *--test-only*) exit 0 ;; esac
echo "$@" >>"$0.said"
echo "$(wc -l <"$0.said")"
"""


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """Stands for SLURM's sbatch; what it was told is in `sbatch.said`, a line a job."""
    (tmp_path / "bin").mkdir()
    path = tmp_path / "bin" / "sbatch"
    path.write_text(FAKE_SBATCH)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path


def submitted(sbatch: Path) -> list[list[str]]:
    """The options and the script's name of each job."""
    lines = sbatch.with_name("sbatch.said").read_text().splitlines()
    return [
        [word.rsplit("/", 1)[-1] for word in line.split() if "kill" not in word and "pars" not in word]
        for line in lines
    ]


# What sacct of 22.05 with slurmdbd printed for such jobs.
SACCT = """case "$*" in
  *=1) printf '1|REQUEUED|n[1-2]\n1|COMPLETED|n[1-2]\n' ;;
  *=3) printf '3_0|COMPLETED|n1\n3_1|COMPLETED|n1\n' ;;
  *=4) echo 'CANCELLED by 0' | sed 's/.*/4|&|n1/' ;;
  *) echo 'Slurm accounting storage is disabled' >&2; exit 1 ;;
esac"""


def test_states_of_jobs_that_the_controller_forgot_come_from_the_accounts(sbatch):
    for name, text in (
        ("sacct", SACCT),
        ("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified'; exit 1"),
    ):
        sbatch.with_name(name).write_text(f"#!/bin/sh\n{text}\n")
        sbatch.with_name(name).chmod(0o755)
    assert commands.show("1") == []
    assert commands.accounted("1") == [{"JobState": "COMPLETED", "NodeList": "n[1-2]", "Restarts": "1"}]
    assert [facts["JobState"] for facts in commands.accounted("3")] == ["COMPLETED", "COMPLETED"]
    assert commands.accounted("4")[0]["JobState"] == "CANCELLED"
    assert commands.accounted("5") == []


def test_an_array_has_one_prepare_for_all(tmp_path, sbatch, capsys):
    run_dir = tmp_path / "run"
    assert (
        main(["submit", "quickstart", "prepare", "pretrain", "distill", f"run_dir={run_dir}", "--array", "seed=1,2"])
        == 0
    )
    assert submitted(sbatch) == [
        ["prepare.sbatch"],
        ["--dependency=afterok:1", "pretrain.sbatch"],
        ["--dependency=aftercorr:2", "distill.sbatch"],
    ]
    scripts = {name: (run_dir / "slurm" / f"{name}.sbatch").read_text() for name in ("prepare", "pretrain")}
    assert "--array" not in scripts["prepare"] and "#SBATCH --array=0-1" in scripts["pretrain"]
    assert load_recipe(str(run_dir / "slurm" / "recipe.yaml")).data_dir == run_dir / "prepare" / "data"
    for number in (0, 1):
        element = load_recipe(str(run_dir / "slurm" / f"recipe-{number}.yaml"))
        assert (element.seed, element.data_dir) == (number + 1, run_dir / "prepare" / "data")
        assert element.model_dir("pretrain") == run_dir / "array" / str(number) / "pretrain" / "model"
    said = capsys.readouterr().out
    assert "prepare: job 1, log " + str(run_dir / "slurm" / "run-prepare-1.log") in said
    assert "run-pretrain-2_<element>.log" in said


def test_an_array_about_prepare_has_one_for_each(tmp_path, sbatch):
    axis = "prepare.tokenizer.vocab_size=500,600"
    assert main(["submit", "quickstart", "prepare", "pretrain", f"run_dir={tmp_path}/run", "--array", axis]) == 0
    assert submitted(sbatch)[1] == ["--dependency=aftercorr:1", "pretrain.sbatch"]
    assert "#SBATCH --array=0-1" in (tmp_path / "run" / "slurm" / "prepare.sbatch").read_text()
    assert load_recipe(str(tmp_path / "run" / "slurm" / "recipe-1.yaml")).prepare_dir is None


def test_a_deepspeed_config_of_the_users_own_is_frozen(tmp_path, sbatch, capsys):
    own = tmp_path / "own.json"
    own.write_text((ROOT / "deepspeed_configs" / "zero2.json").read_text())
    words = ["pretrain", f"run_dir={tmp_path}/run", f"pretrain.engine.zero={own}", "distill.engine.zero=zero1"]
    assert main(["submit", "quickstart", *words]) == 0
    before = own.read_text()
    own.write_text("{")
    frozen = load_recipe(str(tmp_path / "run" / "slurm" / "recipe.yaml"))
    assert Path(frozen.pretrain.engine.zero).parent == tmp_path / "run" / "slurm"
    assert Path(frozen.pretrain.engine.zero).read_text() == before and frozen.distill.engine.zero == "zero1"
    words[1] = f"run_dir={tmp_path}/other"
    assert main(["submit", "quickstart", *words]) == 2 and "own.json:1" in capsys.readouterr().err


def test_a_refused_submission_leaves_no_copy_of_the_code(tmp_path, sbatch, capsys):
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    assert main(["submit", "quickstart", "prepare", f"run_dir={tmp_path}/run"]) == 2
    assert "invalid partition" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "slurm").iterdir()] == ["prepare.sbatch"]


def test_two_submissions_of_one_run_folder_do_not_meet(tmp_path, sbatch, capsys):
    with alone_in(tmp_path / "run" / "slurm"):
        assert main(["submit", "quickstart", f"run_dir={tmp_path}/run"]) == 69
    assert "another process is at work" in capsys.readouterr().err and not sbatch.with_name("sbatch.said").exists()


@pytest.mark.parametrize(
    ("verb", "recipe", "code"), [("prepare", "no-such-recipe", "2"), ("prepar", "quickstart", "70")]
)
def test_a_rank_leaves_its_code_where_the_script_finds_it(tmp_path, verb, recipe, code):
    command = [sys.executable, "-m", "slurm.rank", str(tmp_path), verb, recipe]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"RANK": "3"}, capture_output=True, text=True)
    assert (tmp_path / "3").read_text() == f"{code}\n", done.stderr
    assert done.returncode != 0


def test_only_the_first_start_of_a_job_may_begin_anew(tmp_path, monkeypatch):
    """`resume: false` in the recipe would else throw away what the job's own earlier starts made."""
    given = []
    monkeypatch.setattr(rank, "main", lambda words: given.append(words[2:]) or 0)
    monkeypatch.setattr(rank, "leave", lambda code: None)
    monkeypatch.setattr(rank.signal, "signal", lambda *_: None)
    for name, verb in (("71.0.1", "pretrain"), ("71.0.2", "pretrain"), ("71.3.1", "distill"), ("71.3.1", "prepare")):
        (tmp_path / name).mkdir(exist_ok=True)
        rank.run(tmp_path / name, verb, "recipe.yaml")
    assert given == [[], ["pretrain.resume=true"], ["distill.resume=true"], []]


def test_what_slurm_would_take_and_do_badly_is_refused():
    recipe = load_recipe("quickstart", ["slurm.pretrain.nodes=2", "slurm.pretrain.min_nodes=1"])
    halves = load_recipe("quickstart", ["pretrain.micro_batch_size=16"])
    few = recipe.model_copy(update={"pretrain": halves.pretrain})
    with pytest.raises(UserError, match=r"min_nodes with 96 CPUs a node[\s\S]*exclusive: true"):
        plan(few, ["pretrain"], Site(cpus_per_node=96), 0)
    (job,) = plan(few, ["pretrain"], whole := Site(cpus_per_node=96, exclusive=True), 0)
    text = render(job, whole)
    assert "#SBATCH --mincpus=96" in text and "#SBATCH --cpus-per-task" not in text
    short = load_recipe("quickstart", ["slurm.time_minutes=2", "slurm.notice_s=120"])
    with pytest.raises(UserError, match="notice_s is 120, and the whole start has 120 s"):
        plan(short, ["prepare"], Site(), 0)


def test_a_signal_that_was_ignored_is_ignored_again_when_training_is_over():
    release_signals()  # an earlier test's run in this process may have ended by an error
    before, interrupted = signal.signal(signal.SIGUSR1, signal.SIG_IGN), signal.getsignal(signal.SIGINT)
    try:
        watch_signals()
        watch_signals()  # a second stage in this process
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop_requested()
        release_signals()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == interrupted
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_frozen_code_runs_without_the_checkout(tmp_path):
    code = tmp_path / frozen.code_name()
    for seed in ("seed=1", "seed=2"):
        frozen.freeze(tmp_path, {"recipe.yaml": load_recipe("quickstart", [seed])}, code)
    where = "import trainer, slurm.rank, export; print(trainer.__file__, slurm.rank.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env={"PYTHONPATH": str(code)}, capture_output=True, text=True
    )
    assert done.stdout.count(str(code)) == 2, done.stderr
    again = [sys.executable, "-m", "trainer", "submit", "quickstart", "--dry-run"]
    done = subprocess.run(again, cwd=tmp_path, env={"PYTHONPATH": str(code)}, capture_output=True, text=True)
    assert done.stdout.count("# ====") == 8 and frozen.code_name() in done.stdout
    assert load_recipe(str(tmp_path / "recipe.yaml")).seed == 2
    assert "torch" in json.loads((tmp_path / "environment.json").read_text())["installed"]


def test_the_ledger_keeps_what_was_submitted(tmp_path):
    kept = ledger.Ledger(tmp_path, {"pretrain": "12"})
    kept.write()
    assert ledger.Ledger.read(tmp_path) == kept
    for name in ("run-pretrain-12.log", "run-pretrain-112.log", "run-pretrain-12_0.log", "run-pretrain-120_1.log"):
        (tmp_path / name).touch()
    assert [path.name for path in kept.logs("pretrain")] == ["run-pretrain-12.log", "run-pretrain-12_0.log"]


def test_the_committed_drill_has_every_case_and_every_model_is_the_unbroken_one():
    rows = {row["case"]: row for row in json.loads(DRILL.read_text())["cases"]}
    assert set(rows) == {*CASES, *CHAINS}
    assert {row["ended"] for row in rows.values()} == {"COMPLETED"}
    exact = ["whole chain", *(name for name, case in CASES.items() if case.exact)]
    assert {rows[name]["parameters"] for name in exact} == {"equal"}
    assert rows["signals in prepare"]["parameters"] == "equal data"

"""What a run records about its surroundings, and the command that gives it again."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import environment
from trainer.environment import describe, git_state, launch_command, peak_flops

ROOT = Path(__file__).parents[2]


def test_description_is_json_and_names_what_decides_numbers():
    found = json.loads(json.dumps(describe(), allow_nan=False))
    assert found["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert found["versions"]["torch"] and found["versions"]["transformers"]
    assert found["processor"]["model"] and found["processor"]["memory_gib"] > 0
    assert found["processor"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert isinstance(found["gpus"], list)


def test_secrets_of_the_environment_stay_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = describe()
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    assert "verysecret" not in json.dumps(found)


def test_importing_it_does_not_import_torch():
    code = "import sys, trainer.environment; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- git -------------------------------------------------------------------------------------------------------


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_git_commit_and_whether_files_differ(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_no_git_state_outside_a_checkout_without_git_or_without_a_commit(tmp_path, monkeypatch):
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None  # nothing committed yet
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_a_repository_around_an_installed_package_is_not_ours(tmp_path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "theirs", "--allow-empty")
    (tmp_path / "site-packages").mkdir()
    assert git_state(tmp_path / "site-packages") is None


# ---- peaks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "precision", "tflops"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200", "fp32", 67.0),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "bf16", 312.0),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("Tesla T4", "fp32", 8.1),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_known_peaks(device, precision, tflops):
    assert peak_flops(device, precision) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "fp32"),
        ("", "bf16"),
        ("NVIDIA H20", "bf16"),  # not an H200
        ("NVIDIA A10G", "bf16"),  # not an A10
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),  # a seventh of a card
        ("NVIDIA Imaginary 9000", "bf16"),
        ("Tesla V100-SXM2-16GB", "bf16"),  # has no such units
        ("NVIDIA H200", "int3"),
    ],
)
def test_unknown_devices_and_precisions_have_no_peak(device, precision):
    assert peak_flops(device, precision) is None


# ---- command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def start(*argv, **variables):
        monkeypatch.setattr(sys, "argv", list(argv))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return launch_command()

    return start


def test_installed_command(started):
    assert started("/opt/venv/bin/lmworks", "run", "quickstart", "seed=3") == "lmworks run quickstart seed=3"


def test_modules(started):
    assert started(f"{ROOT}/trainer/__main__.py", "run", "quickstart") == "lmworks run quickstart"
    assert started(f"{ROOT}/trainer/pretrain.py", "r.yaml") == "python -m trainer.pretrain r.yaml"
    assert started(f"{ROOT}/export/bench.py", "r.yaml") == "python -m export.bench r.yaml"


def test_launched_ranks(started):
    stage = f"{ROOT}/trainer/pretrain.py"
    several = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert started(stage, "r.yaml", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2") == (
        "accelerate launch --num_processes 2 -m trainer.pretrain r.yaml"
    )
    assert started(stage, "r.yaml", **several) == (
        "accelerate launch --num_machines 2 --num_processes 8 -m trainer.pretrain r.yaml"
    )


def test_arguments_survive_a_shell(started):
    words = ["run", "my recipe.yaml", "distill.student={every: 2}", "x=$(rm -rf ~);'"]
    assert shlex.split(started("lmworks", *words)) == ["lmworks", *words]


def test_no_absolute_path_of_this_machine(started, tmp_path):
    command = started("/usr/bin/lmworks", "run", f"{tmp_path}/recipes/a.yaml", f"run_dir={tmp_path}/runs/a", "x=a/b=/c")
    assert command == "lmworks run recipes/a.yaml run_dir=runs/a x=a/b=/c"
    outside = started("lmworks", "run", str(tmp_path.parent / "a.yaml"))
    assert outside == "lmworks run ../a.yaml"


def test_the_rendered_command_really_starts_the_same_program(tmp_path):
    """A module started by -m writes its own command; started again by that, it writes the same."""
    code = "from trainer.environment import launch_command\nprint(launch_command())\n"
    (tmp_path / "trainer_probe.py").write_text(code)
    variables = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    first = [sys.executable, "trainer_probe.py", "a b", "c=d"]
    said = subprocess.run(first, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True).stdout.strip()
    again = shlex.split(said.replace("python", shlex.quote(sys.executable), 1))
    assert said == "python trainer_probe.py 'a b' c=d"
    assert (
        subprocess.run(again, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True).stdout.strip()
        == said
    )


def test_table_patterns_are_exclusive():
    """No device name is matched by two rows: whichever came first would win by accident."""
    import re

    names = ["NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", "NVIDIA A10", "NVIDIA L4",
             "NVIDIA L40S", "NVIDIA GH200 480GB", "AMD Instinct MI250", "AMD Instinct MI250X",
             "Tesla V100-PCIE-16GB"]  # fmt: skip
    for name in names:
        assert sum(bool(re.fullmatch(pattern, name)) for pattern, _ in environment._PEAKS_TFLOPS) == 1, name

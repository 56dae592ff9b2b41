"""The doctor on machines that are healthy, lack things, or have broken ones: planted packages and tools."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import doctor
from trainer.__main__ import main
from trainer.doctor import Finding, probe_apart
from trainer.environment import APEX_BUILD
from trainer.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder in front of sys.path, here and in the probes' processes, to plant packages in."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def plant(site, package, version, **files):
    """A package with metadata; `files` are module paths (slashes as __) and their source."""
    information = site / f"{package.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    for name, source in files.items():
        path = site / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        for parent in path.relative_to(site).parents[:-1]:
            (site / parent / "__init__.py").touch()


def command(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def only(rows: list[Finding]) -> Finding:
    assert len(rows) == 1, rows
    return rows[0]


def test_this_machine_passes_and_shows_every_part(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    doctor.run()
    shown = capsys.readouterr().out
    for name in ("Python", "torch", "GPU", "accelerate", "deepspeed", "ONNX Runtime", "tensorrt", "apex", "memory",
                 "disk", "g++", "nvcc", "ninja", "sbatch", "scontrol"):  # fmt: skip
        assert f" {name} " in shown, name


def test_words_stay_whole_in_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = [
        Finding("tensorboard", "broken", "not installed", "training logs", "pip install tensorboard"),
        Finding("GPU", "ok", "NVIDIA H100 80GB HBM3, 79.6 GiB, compute capability 9.0", "training in fp32 and bf16"),
        Finding("onnxscript", "problem", "", "", APEX_BUILD),
    ]
    doctor._show(rows)
    shown = capsys.readouterr().out
    words = {
        word for row in rows for text in (row.name, row.state, row.found, row.use, row.do) for word in text.split()
    }
    assert words - set(shown.split()) == set()


def test_a_broken_core_package_is_exit_2_with_what_to_do(site):
    plant(site, "pyarrow", "99.0", pyarrow="raise ImportError('libarrow.so: cannot open shared object file')")
    code = (
        "from trainer import doctor; from trainer.__main__ import main\n"
        "doctor.PROBES = {name: doctor.PROBES[name] for name in ('Python', 'pyarrow')}\n"
        "raise SystemExit(main(['doctor']))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{site}", "COLUMNS": "160"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "libarrow.so: cannot open shared object file" in done.stdout
    assert "Do: pip install --force-reinstall --no-deps -c constraints.txt pyarrow" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_package_that_kills_its_process_is_a_row(site):
    plant(site, "zstandard", "1.0", zstandard="import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    row = only(probe_apart("zstandard"))
    assert (row.name, row.state, row.found) == ("zstandard", "broken", "the process ended with status -11")


def test_a_package_that_hangs_is_a_row(site, monkeypatch):
    plant(site, "zstandard", "1.0", zstandard="import time; time.sleep(600)")
    monkeypatch.setattr(doctor, "_PROBE_LIMIT_S", 2.0)
    row = only(probe_apart("zstandard"))
    assert (row.state, row.found) == ("broken", "no answer in 2 s")


def test_a_package_that_prints_at_import_does_not_confuse(site):
    plant(site, "zstandard", "1.0", zstandard="print('[[not json')")
    assert only(probe_apart("zstandard")) == Finding("zstandard", "ok", "1.0", "reading .zst")


def test_a_missing_core_package_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    row = only(doctor.PROBES["onnx"]())
    assert (row.state, row.found, row.do) == ("broken", "not installed", "pip install onnx")


def test_a_broken_optional_package_is_no_reason_to_fail(site):
    plant(site, "tensorrt", "11.0", tensorrt="raise RuntimeError('no driver')")
    row = only(probe_apart("tensorrt"))
    assert (row.state, row.found) == ("problem", "RuntimeError: no driver")


def test_both_onnx_runtimes_are_a_conflict(site):
    plant(site, "onnxruntime", "1.30.0", onnxruntime="raise ImportError('must not be imported to find out')")
    plant(site, "onnxruntime-gpu", "1.29.0")
    row = only(probe_apart("ONNX Runtime"))
    assert row.state == "problem"
    assert row.found == "onnxruntime 1.30.0 and onnxruntime-gpu 1.29.0"
    assert row.do.startswith("pip uninstall -y onnxruntime onnxruntime-gpu")


def test_no_onnx_runtime(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    row = only(doctor.PROBES["ONNX Runtime"]())
    assert (row.state, row.found) == ("problem", "not installed")


def test_apex_of_pypi_is_told_from_nvidias_without_importing_either(site):
    poison = "raise SystemExit('imported')"
    plant(site, "apex", "0.9.10", apex__ratelimit=poison)
    (site / "apex" / "__init__.py").write_text(poison)
    row = only(probe_apart("apex"))
    assert row.state == "problem" and row.found.startswith("0.9.10: not NVIDIA's")
    (site / "apex" / "optimizers").mkdir()
    (site / "apex" / "optimizers" / "fused_adam.py").write_text(poison)
    row = only(probe_apart("apex"))
    assert row.state == "problem" and "without its CUDA kernels" in row.found
    (site / "amp_C.py").write_text(poison)
    assert only(probe_apart("apex")).state == "ok"


def test_tools_of_a_cluster(tmp_path, monkeypatch):
    command(tmp_path, "sbatch", "echo slurm 24.05.3")
    command(tmp_path, "scontrol", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    rows = {row.name: row for row in doctor.PROBES["SLURM"]()}
    assert (rows["sbatch"].state, rows["sbatch"].found) == ("ok", "slurm 24.05.3")
    assert rows["scontrol"].state == "absent"


def test_compilers_and_the_one_that_cxx_names(tmp_path, monkeypatch):
    command(tmp_path, "my-c++", "echo 'my-c++ (Debian) 12.2.0'")
    command(
        tmp_path,
        "nvcc",
        "echo 'nvcc: NVIDIA (R) Cuda compiler driver'; echo 'Cuda compilation tools, release 13.0, V13'",
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "my-c++")
    rows = {row.name: row for row in doctor.PROBES["compilers"]()}
    assert rows["my-c++"].found == "my-c++ (Debian) 12.2.0"
    assert rows["nvcc"].found == "Cuda compilation tools, release 13.0, V13"
    assert rows["git"].state == "absent"


def test_deepspeed_without_a_compiler_is_usable_in_part(site, monkeypatch):
    plant(site, "deepspeed", "0.19.8", deepspeed="")
    monkeypatch.setenv("PATH", str(site))
    monkeypatch.setenv("CUDA_HOME", str(site))
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    row = only(doctor.PROBES["deepspeed"]())
    assert row.state == "problem"
    assert row.do.startswith("install ninja and g++")


def test_a_gpu_that_a_cpu_build_of_torch_cannot_see(tmp_path, monkeypatch):
    command(tmp_path, "nvidia-smi", "echo NVIDIA H200")
    monkeypatch.setenv("PATH", str(tmp_path))
    row = doctor._no_gpu("CPU build")
    assert (row.state, row.found) == ("problem", "NVIDIA H200, not seen by torch (CPU build)")
    assert "CUDA build" in row.do
    command(tmp_path, "nvidia-smi", "exit 9")
    assert doctor._no_gpu("CUDA 13.0").found == "nvidia-smi fails"


def test_gpus_and_their_peaks():
    known = {"name": "NVIDIA H200", "memory_gib": 139.8, "compute_capability": "9.0"}
    old = {"name": "Tesla V100-SXM2-16GB", "memory_gib": 15.8, "compute_capability": "7.0"}
    unknown = {"name": "NVIDIA Imaginary", "memory_gib": 10.0, "compute_capability": "12.0"}
    assert doctor._gpu(known).use == "training in fp32 and bf16"
    assert doctor._gpu(old).use == "training in fp32 (no bf16 units)"
    assert doctor._gpu(unknown).use.endswith("peak unknown, so no MFU is reported")


def test_little_disk_is_a_problem():
    assert doctor._enough("disk", 1.0, "free", 5.0, "free space").state == "problem"
    assert doctor._enough("disk", 5.0, "free", 5.0, "free space").state == "ok"


def test_all_broken_parts_are_named_in_one_error(monkeypatch, capsys):
    rows = {"torch": [Finding("torch", "broken", "ImportError: x", "", "reinstall torch")],
            "onnx": [Finding("onnx", "broken", "not installed", "", "pip install onnx")],
            "git": [Finding("git", "absent", "not found")]}  # fmt: skip
    monkeypatch.setattr(doctor, "PROBES", rows)
    monkeypatch.setattr(doctor, "probe_apart", rows.__getitem__)
    with pytest.raises(UserError) as caught:
        doctor.run()
    assert str(caught.value) == (
        "torch: ImportError: x; onnx: not installed\nNeeded: working torch, onnx\nDo: reinstall torch\npip install onnx"
    )


def test_rows_travel_as_json(capsys):
    doctor.print_probe("Python")
    line = capsys.readouterr().out.strip()
    assert line.startswith("lmworks-doctor:")
    assert json.loads(line.removeprefix("lmworks-doctor:"))[0]["name"] == "Python"


def test_the_version_is_told_without_a_verb(capsys, monkeypatch):
    monkeypatch.setattr("trainer.__main__.metadata.version", lambda name: {"lmworks": "1.2.3"}[name])
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, "lmworks 1.2.3\n")

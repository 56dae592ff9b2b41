"""Whole runs on one GPU: ZeRO, half precisions, kernels and compilation against plain AdamW; loss scaling; resuming.

Runs of one test go at the same time, each in a process of its own: DeepSpeed keeps much of its state in globals.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_strategies import assert_alike, recipe, rows, weights  # noqa: F401 - recipe is a fixture
from trainer.engine.precision import has_fp8
from trainer.recipe_file import load_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
RUN_WITH = Path(__file__).with_name("run_with.py")
ROOT = Path(__file__).parents[2]
STEPS = 10
ZERO = ("zero1", "zero2", "zero3")
# Relative, over 10 steps. fp32: losses, norms and weights, as two gloo ranks agree. bf16: losses; on a CPU those of all
# three stages lay within 1e-4 of plain autocast, and kernels of a GPU round in other orders.
FP32, BF16 = 2e-4, 5e-3


def train(*runs, planted=()):
    """Runs `pretrain` with each of these arguments, all at once; returns the exit codes, after what went wrong."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_"))}
    environment = clean | {"PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, RUN_WITH, *planted, "--", "pretrain"]
    processes = [
        subprocess.Popen([*command, *map(str, run)], env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for run in runs
    ]
    codes = []
    for process in processes:
        _, said = process.communicate(timeout=300)
        codes.append(process.returncode)
        if process.returncode:
            print(said[-3000:])
    return codes


@pytest.fixture
def small(recipe):  # noqa: F811
    """Writes a recipe of ten steps without dropout, all in one micro-batch."""

    def write(name, architecture="bert", **settings):
        return recipe(name, architecture, **{"max_steps": STEPS, "micro_batch_size": 8} | settings)

    return write


def assert_losses_alike(path, reference, tolerance):
    for ours, theirs in zip(rows(path), rows(reference), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance), (path.stem, ours["step"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_trains_as_plain_adamw_does(small, precision):
    """All three stages; every step is clipped."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    plain = small("plain", precision=precision)
    stages = {name: small(name, precision=precision) for name in ZERO}
    runs = [(path, f"pretrain.engine.zero={name}") for name, path in stages.items()]
    assert train((plain,), *runs) == [0] * 4
    assert len(rows(plain)) == STEPS and all(row["grad_norm_before_clip"] > 0.05 for row in rows(plain))
    for path in stages.values():
        if precision == "fp32":
            assert_alike(path, plain, FP32)
        else:
            assert_losses_alike(path, plain, BF16)


def saved(path, step):
    """The checkpoint of a step: its numbers, and its marker's state."""
    folder = load_recipe(str(path)).run_dir / "pretrain" / "checkpoints" / f"step-{step:08d}"
    return load_file(folder / "rank-00000-of-00001.safetensors"), json.loads((folder / "COMMITTED").read_text())[
        "state"
    ]


# After a first and a second overflow. torch's scaler halves at once; DeepSpeed's forgives the first (hysteresis 2,
# runtime/fp16/loss_scaler.py). Both begin at 65,536.
@pytest.mark.parametrize(
    ("overrides", "scales"),
    [
        ([], (2.0**15, 2.0**14)),
        (["pretrain.engine.zero=zero0"], (2.0**15, 2.0**14)),
        (["pretrain.engine.zero=zero2"], (2.0**16, 2.0**15)),
    ],
    ids=["plain", "zero0", "zero2"],
)
def test_an_overflow_in_fp16_is_skipped_and_scales_down(small, overrides, scales):
    """Two steps overflow: nothing moves in them, they are counted, and they take their places in the schedule."""
    if overrides:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    settings = {"save_every_steps": 1, "keep_last": STEPS, "schedule": {"name": "linear", "warmup_steps": 2}}
    path, plain = (small(name, precision=name.split("-")[0], **settings) for name in ("fp16-run", "bf16-run"))
    assert train((path, *overrides), planted=["--overflow-at", "4", "5"]) == [0]
    assert train((plain,)) == [0]
    assert [row["skipped_steps"] for row in rows(path)] == [0] * 4 + [1] + [2] * 5
    assert [row["loss_scale"] for row in rows(path)] == [2.0**16] * 4 + [scales[0]] + [scales[1]] * 5
    assert [row["learning_rate"] for row in rows(path)] == [row["learning_rate"] for row in rows(plain)]
    (before, first), (after, last) = saved(path, 4), saved(path, 6)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (first["updates"], last["updates"], saved(path, STEPS)[1]["updates"]) == (4, 4, STEPS - 2)
    for ours, theirs in zip(rows(path)[:4], rows(plain), strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=BF16)


@pytest.mark.skipif(not has_fp8(), reason="torchao is not installed")
def test_fp8_trains_as_bf16_does(small):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply in fp8")
    fp8, bf16 = small("fp8", precision="fp8"), small("bf16", precision="bf16")
    assert train((fp8,), (bf16,)) == [0, 0]
    assert_losses_alike(fp8, bf16, 0.05)  # 3 bits of mantissa, scaled tensor by tensor


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_kernels_and_compilation_train_as_sdpa_does(small, architecture):
    """The kernel of torch and its compiler, under the loop and under ZeRO-3, with the loss in parts."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    cases = {
        "sdpa": ["attention=sdpa"],
        "varlen": ["attention=varlen"],
        "compiled": ["attention=varlen", "compile=true"],
        "checkpointed": ["attention=varlen", "compile=true", "gradient_checkpointing=true", "cross_entropy=chunked"],
        "zero3": ["attention=varlen", "compile=true", "engine.zero=zero3"],
    }
    paths = {name: small(name, architecture, precision="bf16") for name in cases}
    runs = [(paths[name], *(f"pretrain.{word}" for word in words)) for name, words in cases.items()]
    assert train(*runs) == [0] * len(cases)
    for path in paths.values():
        assert_losses_alike(path, paths["sdpa"], BF16)


@pytest.mark.parametrize("overrides", [[], ["pretrain.engine.zero=zero3"]], ids=["plain", "zero3"])
def test_a_run_goes_on_to_the_bit(small, overrides):
    """Stopped after five steps, with deterministic kernels."""
    if overrides:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    words = [*overrides, "pretrain.attention=sdpa"]
    unbroken, broken = small("unbroken", precision="bf16"), small("broken", precision="bf16")
    assert train((unbroken, *words), planted=["--deterministic"]) == [0]
    assert train((broken, *words), planted=["--deterministic", "--stop-before", "5"]) == [75]
    assert train((broken, *words), planted=["--deterministic"]) == [0]
    assert [row["step"] for row in rows(broken, "resume")] == [5]
    assert [row["loss"] for row in rows(broken)] == [row["loss"] for row in rows(unbroken)]
    ours, theirs = weights(broken), weights(unbroken)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="DeepSpeed compiles its quantizer, which needs nvcc")
def test_zeropp_trains_as_zero3_does(small):
    """Weights and gradients that travel quantized; on one GPU they travel to itself."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    quantized, zero3 = small("quantized", precision="bf16"), small("zero3", precision="bf16")
    assert train((quantized, "pretrain.engine.zero=zeropp"), (zero3, "pretrain.engine.zero=zero3")) == [0, 0]
    assert_losses_alike(quantized, zero3, 0.05)

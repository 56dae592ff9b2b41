"""Two real gloo ranks, started as users start them, against one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]
ONE_STEP = Path(__file__).with_name("one_step.py")
NO_DROPOUT = {
    "bert": ["pretrain.model.config.hidden_dropout_prob=0", "pretrain.model.config.attention_probs_dropout_prob=0"],
    "gpt2": [f"pretrain.model.config.{name}=0" for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")],
}


def environment():
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_"))}
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(*words, flags=("--multi_gpu",)):
    """`accelerate launch` of two ranks on a free port."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--num_processes", "2"]
    return [*command, "--main_process_port", str(port), *map(str, words)]


def run(command):
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture
def padded_recipe(tiny_recipe, tmp_path):
    """A recipe whose documents are too long to share a row of 32 tokens and too short to fill one."""

    def write(architecture):
        draw = np.random.default_rng(1)
        lines = [
            " ".join(f"{letter}" for letter in draw.choice(list("abcdefg"), size=draw.integers(16, 28)))
            for _ in range(60)
        ]
        (tmp_path / "text.txt").write_text("\n".join(lines))
        tree = tiny_recipe(tmp_path / architecture, architecture)
        tree["prepare"]["sources"] = [{"type": "text", "paths": [str(tmp_path / "text.txt")], "document": "line"}]
        tree["prepare"]["tokenizer"] = {
            "type": "wordpiece" if architecture == "bert" else "byte_level_bpe",
            "vocab_size": 300,
        }
        path = tmp_path / f"{architecture}.yaml"
        path.write_text(json.dumps(tree))
        assert main(["prepare", str(path)]) == 0
        return path

    return write


@pytest.mark.parametrize("architecture", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_splitting_a_batch_does_not_matter(padded_recipe, tmp_path, architecture):
    """1 x 8, 4 x 2 and 2 ranks x 2 x 2 rows give the same gradients, loss and norm; rows are unequally padded."""
    recipe = padded_recipe(architecture)
    splits = {"1x8": "8", "4x2": "2"}
    for name, micro in splits.items():
        run(
            [
                sys.executable,
                ONE_STEP,
                recipe,
                tmp_path / name,
                f"pretrain.micro_batch_size={micro}",
                *NO_DROPOUT[architecture],
            ]
        )
    run(launch(ONE_STEP, recipe, tmp_path / "2x2x2", "pretrain.micro_batch_size=2", *NO_DROPOUT[architecture]))
    whole = torch.load(tmp_path / "1x8.0")
    assert whole["counts"]["tokens"] < 8 * 32 - 5
    for other in ("4x2.0", "2x2x2.0", "2x2x2.1"):
        part = torch.load(tmp_path / other)
        assert part["counts"] == whole["counts"]
        assert part["row"]["loss"] == pytest.approx(whole["row"]["loss"], rel=1e-6)
        norm = whole["row"]["grad_norm_before_clip"]
        assert part["row"]["grad_norm_before_clip"] == pytest.approx(norm, rel=1e-6)
        for tensor_name, expected in whole["gradients"].items():
            largest = expected.abs().max().item()
            torch.testing.assert_close(
                part["gradients"][tensor_name], expected, rtol=1e-6, atol=1e-6 * max(largest, 1e-3), msg=tensor_name
            )
    ranks = [torch.load(tmp_path / f"2x2x2.{rank}")["samples"] for rank in (0, 1)]
    assert ranks == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def weights(recipe):
    return load_file(load_recipe(str(recipe)).run_dir / "pretrain" / "model" / "model.safetensors")


def rows(recipe, event):
    lines = (load_recipe(str(recipe)).run_dir / "pretrain" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


@pytest.fixture
def without_dropout(written_recipe):
    def write(name, **settings):
        path = written_recipe("bert", name, micro_batch_size=2, **settings)
        tree = json.loads(path.read_text())
        tree["pretrain"]["model"]["config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        path.write_text(json.dumps(tree))
        return path

    return write


def test_two_ranks_train_as_one_and_preempt_together(without_dropout):
    """The plain command; without a GPU it needs no --multi_gpu. Then: SIGTERM to one rank, and on with one rank."""
    alone, together, stopped = (without_dropout(name, max_steps=30) for name in ("alone", "together", "stopped"))
    assert main(["pretrain", str(alone)]) == 0
    done = run(launch("-m", "trainer.pretrain", together, flags=()))
    assert "starting them all" in done.stdout or torch.cuda.is_available()
    launched = json.loads((load_recipe(str(together)).run_dir / "pretrain" / "launch.json").read_text())
    assert launched["ranks"] == 2
    for one, two in zip(rows(alone, "train"), rows(together, "train"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["tokens"] == one["tokens"]
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(together)[name], tensor, rtol=1e-3, atol=1e-4)

    process = subprocess.Popen(
        launch("-m", "trainer.pretrain", stopped, "pretrain.max_steps=300", "pretrain.save_every_steps=1000"),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    metrics = load_recipe(str(stopped)).run_dir / "pretrain" / "metrics.jsonl"
    signal_one_rank_after(process, metrics, '"step": 5,', signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "saved; run the same command" in said
    (saved,) = (load_recipe(str(stopped)).run_dir / "pretrain" / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert 5 <= step < 300
    assert main(["pretrain", str(stopped), "pretrain.max_steps=300", "pretrain.eval_every_steps=300"]) == 0
    assert [row["step"] for row in rows(stopped, "resume")] == [step]


@pytest.mark.slow
def test_a_launcher_that_restarts_its_ranks_goes_on(without_dropout):
    """SIGKILL to one rank under --max-restarts: all ranks begin again in the launcher's own store, and resume, to the
    very weights of two ranks that nobody broke."""
    settings = {"max_steps": 120, "save_every_steps": 5, "eval_every_steps": 120}
    unbroken, restarted = (without_dropout(name, **settings) for name in ("unbroken", "restarted"))
    _, said = (process := start_ranks(unbroken)).communicate(timeout=200)
    assert process.returncode == 0, said[-3000:]
    process = start_ranks(restarted)
    metrics = load_recipe(str(restarted)).run_dir / "pretrain" / "metrics.jsonl"
    signal_one_rank_after(process, metrics, '"step": 20,', signal.SIGKILL)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said[-3000:]
    (resumed,) = rows(restarted, "resume")
    assert resumed["step"] >= 15 and rows(unbroken, "resume") == []
    for name, tensor in weights(unbroken).items():
        torch.testing.assert_close(weights(restarted)[name], tensor, rtol=0, atol=0)


def start_ranks(recipe):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1",
         f"--master-port={port}", "-m", "trainer.pretrain", recipe],
        env=environment(), stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def signal_one_rank_after(process, path, text, number):
    """A signal to rank 1 alone, once `text` is in the file: rank 0 has to hear of it from rank 1."""
    import psutil

    began = time.monotonic()
    while not (path.is_file() and text in path.read_text()):
        assert process.poll() is None and time.monotonic() - began < 90
        time.sleep(0.01)
    ranks = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "trainer.pretrain" in child.cmdline()
    ]
    (rank_1,) = [child for child in ranks if child.environ().get("RANK") == "1"]
    rank_1.send_signal(number)

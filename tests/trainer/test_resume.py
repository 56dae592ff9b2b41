"""Kill at any instant, break any file: the run goes on where it was, to the bit."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.errors import UserError
from trainer.pretrain import run
from trainer.recipe_file import load_recipe

KILL_MANY = Path(__file__).with_name("kill_many.py")
FILE = "rank-00000-of-00001.safetensors"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def run_dir(recipe_path):
    return load_recipe(str(recipe_path)).run_dir


def weights(recipe_path, stage="pretrain"):
    return load_file(run_dir(recipe_path) / stage / "model" / "model.safetensors")


def events(recipe_path, kind, stage="pretrain"):
    lines = (run_dir(recipe_path) / stage / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == kind]


def losses(recipe_path, stage="pretrain"):
    """Loss by step, of the attempt that counted."""
    return {row["step"]: row["loss"] for row in events(recipe_path, "train", stage)}


def assert_same_run(one, two, stage="pretrain"):
    ours, theirs = weights(one, stage), weights(two, stage)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert losses(one, stage) == losses(two, stage)
    last = [events(path, "eval", stage)[-1] for path in (one, two)]
    assert last[0] == last[1]


@pytest.mark.parametrize("architecture", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_killed_many_times_it_ends_as_if_nothing_had_happened(written_recipe, architecture):
    """Checkpoints after every step, so that many kills fall into saving; dropout on; accumulation 2."""
    settings = {"max_steps": 60, "save_every_steps": 1, "global_batch_size": 12, "micro_batch_size": 6}
    unbroken, broken = (written_recipe(architecture, name, **settings) for name in ("unbroken", "broken"))
    assert main(["pretrain", str(unbroken)]) == 0
    metrics = run_dir(broken) / "pretrain" / "metrics.jsonl"
    step_s = events(unbroken, "end")[-1]["seconds"] / 60  # with its checkpoint; on a slow machine kills come later
    delays = [f"{delay:.3f}" for delay in np.random.default_rng(4).uniform(0.0, 5 * step_s, size=14)]
    done = subprocess.run(
        [sys.executable, str(KILL_MANY), str(broken), "pretrain", str(metrics), *delays],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["code"] == 0, done.stderr
    assert report["killed"] >= 5
    assert events(broken, "resume")
    assert_same_run(unbroken, broken)
    left = sorted(path.name for path in (run_dir(broken) / "pretrain" / "checkpoints").iterdir())
    assert left == ["LATEST", "step-00000059", "step-00000060"]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGUSR1))]
)
def test_a_signal_saves_and_exits_75(written_recipe, number):
    unbroken = written_recipe(name="unbroken", max_steps=200, save_every_steps=1000)
    assert main(["pretrain", str(unbroken)]) == 0
    stopped = written_recipe(name="stopped", max_steps=200, save_every_steps=1000)
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.pretrain", str(stopped)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    wait_for(run_dir(stopped) / "pretrain" / "metrics.jsonl", '"step": 5,')
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "run the same command" in said and "Traceback" not in said
    assert len(list((run_dir(stopped) / "pretrain" / "checkpoints").glob("step-*"))) == 1
    assert main(["pretrain", str(stopped)]) == 0
    assert_same_run(unbroken, stopped)


def test_a_signal_in_evaluation_is_answered_there(written_recipe, monkeypatch):
    recipe_path = written_recipe(max_steps=6, eval_every_steps=3, micro_batch_size=2, global_batch_size=8)
    recipe = load_recipe(str(recipe_path))
    import trainer.engine.loop as loop

    real, calls = loop.language_model, []

    def signal_in_second_evaluation(model, batch):
        if not model.training:
            calls.append(1)
            if len(calls) == 10:  # 8 batches in the evaluation at step 0
                os.kill(os.getpid(), signal.SIGTERM)
        return real(model, batch)

    monkeypatch.setattr(loop, "language_model", signal_in_second_evaluation)
    assert main(["pretrain", str(recipe_path)]) == 75
    assert len(calls) == 10  # cut short: no further batch was evaluated
    assert [row["step"] for row in events(recipe_path, "eval")] == [0]
    monkeypatch.setattr(loop, "language_model", real)
    assert main(["pretrain", str(recipe_path)]) == 0
    assert [row["step"] for row in events(recipe_path, "eval")] == [0, 3, 6]
    assert recipe.model_dir("pretrain").is_dir()


def wait_for(path, text, limit_s=60):
    began = time.monotonic()
    while not (path.is_file() and text in path.read_text()):
        assert time.monotonic() - began < limit_s, f"{text!r} never came to {path}"
        time.sleep(0.01)


@pytest.fixture
def half_done(written_recipe, monkeypatch):
    """A run of 12 steps, stopped after 8 with checkpoints at 4 and 8, and an equal unbroken one."""
    unbroken, stopped = written_recipe(name="unbroken"), written_recipe(name="stopped")
    run(load_recipe(str(unbroken)))
    import trainer.engine.loop as loop

    real = loop.take_step

    def step(run, number, *rest):
        if number == 9:
            raise KeyboardInterrupt
        return real(run, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", step)
        with pytest.raises(KeyboardInterrupt):
            run(load_recipe(str(stopped)))
    checkpoints = run_dir(stopped) / "pretrain" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["LATEST", "step-00000004", "step-00000008"]
    return unbroken, stopped, checkpoints


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_a_folder_of(path):
    """What no process can read, whoever it runs as."""
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda folder: flip_a_byte(folder / FILE), f"{FILE} is not what was written"),
        (lambda folder: os.truncate(folder / FILE, 100), f"{FILE} is not what was written"),
        (lambda folder: (folder / FILE).unlink(), f"{FILE} is missing"),
        (lambda folder: (folder / "COMMITTED").unlink(), "no COMMITTED marker"),
        (lambda folder: (folder / "COMMITTED").write_text("{"), "marker is unreadable"),
        (lambda folder: make_a_folder_of(folder / FILE), f"{FILE} cannot be read: [Errno {errno.EISDIR}]"),
        (lambda folder: make_a_folder_of(folder / "COMMITTED"), "marker cannot be read: [Errno"),
    ],
)
def test_a_broken_checkpoint_is_named_skipped_and_kept(half_done, capfd, fault, reason):
    unbroken, stopped, checkpoints = half_done
    fault(checkpoints / "step-00000008")
    assert main(["pretrain", str(stopped)]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert reason in said and "step-00000008 is broken" in said
    assert "resuming at step 4" in said
    assert (checkpoints / "broken-step-00000008").is_dir()
    assert_same_run(unbroken, stopped)


def test_all_broken_is_an_error_that_touches_nothing(half_done, capfd):
    """Not a beginning at step 0, which nobody asked for; one node that does not see the files is enough for it."""
    unbroken, stopped, checkpoints = half_done
    (checkpoints / "step-00000004" / FILE).rename(checkpoints / "elsewhere")
    (checkpoints / "step-00000008" / "COMMITTED").unlink()
    for _ in range(2):  # the second time as the first
        assert main(["pretrain", str(stopped)]) == 2
        said = " ".join(capfd.readouterr().err.split())
        assert f"step-00000008: no COMMITTED marker step-00000004: {FILE} is missing" in said
        assert "<stage>.resume=false" in said
    (checkpoints / "elsewhere").rename(checkpoints / "step-00000004" / FILE)
    assert main(["pretrain", str(stopped)]) == 0
    assert [row["step"] for row in events(stopped, "resume")] == [4]
    assert_same_run(unbroken, stopped)


def test_all_broken_may_be_set_aside(half_done):
    unbroken, stopped, checkpoints = half_done
    for path in checkpoints.glob("step-*"):
        (path / "COMMITTED").unlink()
    assert main(["pretrain", str(stopped), "pretrain.resume=false"]) == 0
    assert (checkpoints.parent / "checkpoints-aside" / "step-00000008").is_dir()
    assert_same_run(unbroken, stopped)


def test_another_recipe_does_not_continue_the_checkpoints(half_done):
    _, stopped, checkpoints = half_done
    with pytest.raises(UserError) as error:
        run(load_recipe(str(stopped), ["pretrain.optim.learning_rate=1e-4"]))
    assert "optim.learning_rate: 0.005 there, 0.0001 now" in str(error.value)
    assert main(["pretrain", str(stopped), "pretrain.optim.learning_rate=1e-4", "pretrain.resume=false"]) == 0
    assert (checkpoints.parent / "checkpoints-aside" / "step-00000008").is_dir()


def test_another_micro_batch_may_continue(half_done):
    unbroken, stopped, _ = half_done
    assert main(["pretrain", str(stopped), "pretrain.micro_batch_size=4"]) == 0
    assert [row["step"] for row in events(stopped, "resume")] == [8]
    ours, theirs = losses(stopped), losses(unbroken)
    assert ours[8] == theirs[8]
    assert ours[9] == pytest.approx(theirs[9], rel=1e-2)  # dropout falls otherwise in smaller micro-batches


def test_a_run_that_is_done_is_done(half_done):
    unbroken, _, _ = half_done
    before = weights(unbroken)
    assert main(["pretrain", str(unbroken)]) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(unbroken).items())
    assert len(events(unbroken, "train")) == 12

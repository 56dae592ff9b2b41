"""Gradients that are not finite, losses that spike, full disks, saving in the background: the run answers."""

import errno
import json
import math
import os

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

import trainer.engine.checkpoint as checkpoint
import trainer.engine.consolidate as consolidate
import trainer.engine.fragments as fragments
import trainer.engine.loop as loop
from trainer.__main__ import main
from trainer.config import deciding_settings
from trainer.engine import precision
from trainer.engine.engine import Engine
from trainer.engine.fragments import FragmentFiles
from trainer.errors import UserError
from trainer.models import build
from trainer.objectives.language_model import language_model
from trainer.recipe_file import load_recipe
from trainer.session import Session


def folder_of(path):
    return load_recipe(str(path)).stage_dir("pretrain")


def rows(path, event="train"):
    lines = (folder_of(path) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def weights(path):
    return load_file(folder_of(path) / "model" / "model.safetensors")


def poison(monkeypatch, at):
    """Every gradient of the steps in `at` (from 0) becomes nan."""
    real, seen = Engine.backward, []

    def backward(self, loss, last):
        step = len(seen)
        seen.append(step)
        real(self, loss * math.nan if step in at else loss, last)

    monkeypatch.setattr(Engine, "backward", backward)


def test_a_bad_step_is_skipped_counted_and_survived(written_recipe, monkeypatch):
    path = written_recipe()
    poison(monkeypatch, {5})
    assert main(["pretrain", str(path)]) == 0
    assert [row["skipped_steps"] for row in rows(path)] == [0] * 5 + [1] * 7
    assert all(tensor.isfinite().all() for tensor in weights(path).values())
    assert rows(path)[-1]["loss"] < rows(path)[0]["loss"]


def test_a_skipped_step_changes_no_number(written_recipe, monkeypatch):
    """Not even the optimizer's count of steps, from which Adam corrects its bias."""
    path = written_recipe(max_steps=4, save_every_steps=2)
    poison(monkeypatch, {2, 3})
    assert main(["pretrain", str(path)]) == 0
    before, after = (folder_of(path) / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    file = "rank-00000-of-00001.safetensors"
    ours, theirs = load_file(before / file), load_file(after / file)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((after / "COMMITTED").read_text())["state"]["updates"] == 2


def test_too_many_bad_steps_end_the_run_and_name_the_samples(written_recipe, monkeypatch, capfd):
    path = written_recipe(save_every_steps=2, max_bad_steps=3)
    with monkeypatch.context() as patch:
        poison(patch, range(5, 100))
        assert main(["pretrain", str(path)]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "not finite in 3 steps in a row" in said and "step 7: samples 56 to 63" in said
    for saved in folder_of(path).glob("checkpoints/step-*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(saved).values())
    assert main(["pretrain", str(path)]) == 0


def test_a_loss_spike_goes_back_and_leaves_its_batches_out(written_recipe, monkeypatch):
    spike = {"factor": 1.5, "window_steps": 8, "skip_steps": 3, "max_rewinds": 1}
    path = written_recipe(max_steps=14, save_every_steps=4, loss_spike=spike)
    real, samples = loop.take_step, []

    def take_step(run, step, batches, counts):
        taken = real(run, step, batches, counts)
        samples.append((step, batches[0].sample_ids[0] // 8))
        return loop.Taken(taken.loss_share * (10 if samples[-1] == (10, 10) else 1), taken.result)

    monkeypatch.setattr(loop, "take_step", take_step)
    assert main(["pretrain", str(path)]) == 0
    (event,) = rows(path, "rewind")
    assert (event["step"], event["spiked_at"], event["data_shift_steps"]) == (8, 10, 5)
    assert samples == [(n, n) for n in range(11)] + [(8, 13), (9, 14), (10, 15), (11, 16), (12, 17), (13, 18)]


def test_spikes_without_end_stop_the_run(written_recipe, monkeypatch, capfd):
    spike = {"window_steps": 8, "skip_steps": 1, "max_rewinds": 1}
    path = written_recipe(max_steps=40, save_every_steps=4, loss_spike=spike)
    real = loop.take_step

    def take_step(run, step, batches, counts):
        taken = real(run, step, batches, counts)
        return loop.Taken(taken.loss_share * (10 if step in (9, 20) else 1), taken.result)

    monkeypatch.setattr(loop, "take_step", take_step)
    assert main(["pretrain", str(path)]) == 2
    assert "spiked at step 20" in capfd.readouterr().err


def test_rewinds_are_counted_over_restarts(written_recipe, monkeypatch, capfd):
    spike = {"window_steps": 8, "skip_steps": 1, "max_rewinds": 1}
    path = written_recipe(max_steps=40, save_every_steps=4, loss_spike=spike)
    real, stopped = loop.take_step, []

    def take_step(run, step, batches, counts):
        if step == 14 and not stopped:
            stopped.append(step)
            return None  # as if a signal had come
        taken = real(run, step, batches, counts)
        return loop.Taken(taken.loss_share * (10 if step in (9, 24) else 1), taken.result)

    monkeypatch.setattr(loop, "take_step", take_step)
    assert main(["pretrain", str(path)]) == 75
    assert main(["pretrain", str(path)]) == 2
    assert "spiked at step 24 after 1 rewinds" in capfd.readouterr().err


def test_a_full_disk_is_said_and_the_run_goes_on(written_recipe, monkeypatch, capfd):
    path = written_recipe()
    real = checkpoint.write_file

    def full(target, entries):
        if "step-00000008" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(target, entries)

    monkeypatch.setattr(checkpoint, "write_file", full)
    assert main(["pretrain", str(path)]) == 0
    assert "No space left on device" in capfd.readouterr().err
    left = sorted(saved.name for saved in (folder_of(path) / "checkpoints").iterdir())
    assert left == ["LATEST", "step-00000004", "step-00000012"]


def test_any_other_failure_to_write_ends_the_run(written_recipe, monkeypatch, capfd):
    path = written_recipe()

    def broken(target, entries):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "write_file", broken)
    assert main(["pretrain", str(path)]) == 2
    assert "could not be written (rank 0" in capfd.readouterr().err


def test_whatever_goes_wrong_in_a_commit_is_said(run, monkeypatch):
    def broken(path, value):
        raise ValueError("a number that JSON has not")

    monkeypatch.setattr(checkpoint, "write_json", broken)
    with pytest.raises(UserError, match="ValueError: a number that JSON has not"):
        run.checkpoints.save(1, {"tokens": 0})
    assert not list(run.checkpoints._folder.iterdir())


def test_an_old_checkpoint_that_cannot_be_removed_is_said_and_the_run_goes_on(written_recipe, monkeypatch, capfd):
    path = written_recipe(keep_last=1)
    real = checkpoint.shutil.rmtree

    def busy(folder, ignore_errors=False):
        if folder.name == "step-00000004":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))
        real(folder, ignore_errors)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    assert main(["pretrain", str(path)]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "step-00000004 could not be removed" in said and "Directory not empty" in said
    left = sorted(saved.name for saved in (folder_of(path) / "checkpoints").iterdir())
    assert left == ["LATEST", "step-00000004", "step-00000012"]


@pytest.fixture
def run(written_recipe):
    recipe = load_recipe(str(written_recipe()))
    session = Session(recipe, "pretrain", recipe.pretrain, recipe.pretrain.objective, recipe.pretrain.data)
    model = build(recipe.pretrain.model, session.tokenizer, session.causal, 32, recipe.seed)
    return session.wire(model, language_model, {})


def folder_of_step(run, step):
    return run.checkpoints._folder / f"step-{step:08d}"


def test_saving_in_the_background_saves_what_was_there(run, monkeypatch):
    """Parameters and moments change right after the call returns, before a byte is written."""
    import threading

    go_on = threading.Event()
    real = checkpoint.write_file

    def late(path, entries):
        go_on.wait(10)
        real(path, entries)

    batches = run.batches(0)
    loop.take_step(run, 0, batches, loop.count_targets(run, 0, batches)[0])
    expected = run.engine.snapshot()
    monkeypatch.setattr(checkpoint, "write_file", late)
    run.checkpoints.save(1, {"tokens": 0}, in_background=True)
    with torch.no_grad():
        for fragment in run.engine._strategy.fragments():
            for key in ("weight", "exp_avg"):
                fragment.write(key, torch.zeros(fragment.numel))
    go_on.set()
    run.checkpoints.finish()
    files = run.checkpoints.files(1)
    for entry, tensor in expected.items():
        key, start, name = entry.split("/", 2)
        assert torch.equal(files.load(key, name, int(start), tensor.numel()), tensor)


def test_a_step_that_is_saved_is_not_written_again(run, monkeypatch):
    """A signal right after a save: the checkpoint stays untouched all the while, and only its state may change."""
    run.checkpoints.save(1, {"tokens": 8, "rewinds": 0})
    folder = folder_of_step(run, 1)
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}

    def refuse(*_):
        raise AssertionError("written or removed again")

    monkeypatch.setattr(checkpoint, "write_file", refuse)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    run.checkpoints.save(1, {"tokens": 8, "rewinds": 0})
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before
    run.checkpoints.save(1, {"tokens": 8, "rewinds": 1})
    assert json.loads((folder / "COMMITTED").read_text())["state"]["rewinds"] == 1
    assert run.checkpoints.load_newest().state["rewinds"] == 1


def test_fragments_are_found_however_they_are_cut(tmp_path):
    from safetensors.torch import save_file

    whole = torch.arange(20.0)
    save_file({"weight/0/a/b.c": whole[:7].clone(), "exp_avg/0/a/b.c": whole[:7] * 2}, tmp_path / "one")
    save_file({"weight/7/a/b.c": whole[7:].clone()}, tmp_path / "two")
    files = FragmentFiles([tmp_path / "one", tmp_path / "two"])
    assert torch.equal(files.load("weight", "a/b.c", 3, 12), whole[3:15])
    assert files.keys == {"weight", "exp_avg"}
    with pytest.raises(KeyError, match="7 of the elements 0 to 20"):
        files.load("exp_avg", "a/b.c", 0, 20)


@pytest.mark.skipif(not hasattr(psutil.Process, "memory_maps"), reason="open files cannot be listed here")
@pytest.mark.parametrize(("most_open", "opened"), [(500, 3), (2, 3 + 3 * 4)])
def test_each_file_is_opened_once_while_no_more_than_the_limit_are(tmp_path, monkeypatch, most_open, opened):
    """Three ranks' files, four parameters with a piece in each; what is closed is really closed."""
    whole = torch.arange(12.0)
    paths = [tmp_path / f"rank-{rank}" for rank in range(3)]
    for rank, path in enumerate(paths):
        piece = whole[rank * 4 : rank * 4 + 4]
        fragments.write_file(path, {f"weight/{rank * 4}/layer.{number}": piece + number for number in range(4)})
    calls, real = [], fragments.safe_open
    monkeypatch.setattr(fragments, "safe_open", lambda path, kind: calls.append(path) or real(path, kind))
    monkeypatch.setattr(fragments, "_MOST_OPEN", most_open)
    files = FragmentFiles(paths)
    for number in range(4):
        assert torch.equal(files.load("weight", f"layer.{number}", 0, 12), whole + number)
    assert len(calls) == opened

    def mapped():
        return {entry.path for entry in psutil.Process().memory_maps()} & set(map(str, paths))

    assert len(mapped()) == min(most_open, 3)
    del files
    assert not mapped()


def test_a_model_folder_of_several_files_opens(written_recipe, monkeypatch):
    one, several = written_recipe(name="one", max_steps=2), written_recipe(name="several", max_steps=2)
    assert main(["pretrain", str(one)]) == 0
    monkeypatch.setattr(consolidate, "_MAX_FILE_BYTES", 30_000)
    assert main(["pretrain", str(several)]) == 0
    assert len(list((folder_of(several) / "model").glob("model-*.safetensors"))) > 2
    models = [AutoModelForMaskedLM.from_pretrained(folder_of(path) / "model").state_dict() for path in (one, several)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


TWO_PHASES = [
    {
        "max_steps": 8,
        "sequence_length": 64,
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "learning_rate": 1e-3,
        "schedule": {"name": "linear", "warmup_steps": 2},
    }
]


def test_phases_follow_exactly_and_resume_exactly(written_recipe):
    """Stopped before, at and after the switch; each time it goes on as if nothing had happened."""
    whole, broken = (written_recipe(name=name, max_steps=6, phases=TWO_PHASES) for name in ("whole", "broken"))
    assert main(["pretrain", str(whole)]) == 0
    real = loop.count_targets
    for stop in (4, 6, 9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "count_targets", lambda run, step, b, stop=stop: (real(run, step, b)[0], step == stop))
            assert main(["pretrain", str(broken)]) == 75
    assert main(["pretrain", str(broken)]) == 0
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(broken).items())
    train = rows(whole)
    assert [row["samples"] for row in train] == [*range(8, 56, 8), *range(52, 84, 4)]
    assert train[5]["learning_rate"] == 0.005 * (1 - 5 / 6) and train[6]["learning_rate"] == 1e-3 / 2
    assert 8 * 20 < train[5]["tokens"] - train[4]["tokens"] <= 8 * 32
    assert 4 * 40 < train[9]["tokens"] - train[8]["tokens"] <= 4 * 64


def test_the_micro_batch_of_a_phase_may_change_at_a_resume_and_its_learning_rate_may_not(written_recipe):
    def deciding(name, **changed):
        return deciding_settings(load_recipe(str(written_recipe(name=name, phases=[TWO_PHASES[0] | changed]))).pretrain)

    assert deciding("same") == deciding("smaller", micro_batch_size=2)
    assert deciding("one") != deciding("other", learning_rate=2e-3)


def test_a_phase_is_checked_like_a_section(written_recipe, capfd):
    path = written_recipe(phases=[{"max_steps": 3, "global_batch_size": 7}])
    assert main(["pretrain", str(path)]) == 2
    assert "not a multiple of micro_batch_size 8" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("asked", "strategy", "message"),
    [
        ("fp16", "ddp", "precision: fp16 on a CPU"),
        ("tf32", "ddp", "precision: tf32 on a CPU"),
        ("fp8", "ddp", "fp8 on a CPU"),
    ],
)
def test_a_precision_that_is_not_there_is_refused(asked, strategy, message):
    with pytest.raises(UserError, match=message):
        precision.require(asked, "cpu", strategy)


def test_fp8_without_a_layer_that_multiplies_in_it_is_refused():
    """As of GPT-2, whose layers torchao leaves alone."""

    class Float8Linear(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    with pytest.raises(UserError, match="no layer of this model can multiply in it"):
        precision.require_fp8_layers(model)
    precision.require_fp8_layers(model.append(Float8Linear(16, 16)))


def test_an_encoder_that_looks_ahead_is_no_causal_model(written_recipe, capfd):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    path = written_recipe("gpt2", model={"architecture": "roberta", "config": small})
    assert main(["pretrain", str(path)]) == 2
    assert "sees later tokens" in capfd.readouterr().err


def test_a_folder_without_the_head_is_refused(written_recipe, tmp_path, capfd):
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    path = written_recipe()
    config = AutoConfig.for_model("bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                  intermediate_size=32, vocab_size=400)  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path / "headless")
    AutoTokenizer.from_pretrained(folder_of(path).parent / "prepare" / "tokenizer").save_pretrained(
        tmp_path / "headless"
    )
    assert main(["pretrain", str(path), f"pretrain.model={{init_from: {tmp_path / 'headless'}}}"]) == 2
    assert "lacks" in capfd.readouterr().err


@pytest.mark.parametrize("config", ["{hidden_size: 250}", "{hidden_size: abc}", "{hidden_act: gellu}"])
def test_a_config_that_transformers_refuses_is_one_message(written_recipe, capfd, config):
    path = written_recipe()
    assert main(["pretrain", str(path), f"pretrain.model={{architecture: bert, config: {config}}}"]) == 2
    assert "Traceback" not in capfd.readouterr().err

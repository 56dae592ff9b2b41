import json

import pytest
import torch
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.artifact import content_hash, read_artifact
from trainer.models import load_model
from trainer.recipe_file import load_recipe


@pytest.fixture
def with_teacher(written_recipe):
    def make(architecture="bert", **pretrain):
        path = written_recipe(architecture, max_steps=60, eval_every_steps=60, **pretrain)
        assert main(["pretrain", str(path)]) == 0
        return path

    return make


def rows(recipe_path, event):
    lines = (load_recipe(str(recipe_path)).run_dir / "distill" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


FRESH = {
    "bert": "{config: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}}",
    "gpt2": "{config: {n_embd: 32, n_layer: 1, n_head: 2}}",
}


@pytest.mark.parametrize("architecture", FRESH)
def test_a_fresh_student_comes_nearer_to_its_teacher(with_teacher, architecture):
    path = with_teacher(architecture)
    more = ["distill.max_steps=60", "distill.optim.learning_rate=5e-3", f"distill.student={FRESH[architecture]}"]
    assert main(["distill", str(path), *more]) == 0
    first, last = rows(path, "train")[0], rows(path, "train")[-1]
    assert last["loss_soft"] < 0.8 * first["loss_soft"]
    assert last["loss_hidden"] < 0.8 * first["loss_hidden"]
    parts = 5 * last["loss_soft"] + 2 * last["loss_hard"] + last["loss_hidden"]
    assert last["loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize(
    ("architecture", "student"),
    [("bert", "{architecture: distilbert, every: 2}"), ("bert", "{keep_layers: [1]}"), ("gpt2", "{every: 2}")],
)
def test_a_student_of_the_teachers_layers_begins_near_it(with_teacher, architecture, student):
    path = with_teacher(architecture)
    assert main(["distill", str(path), f"distill.student={FRESH[architecture]}"]) == 0
    fresh = rows(path, "train")[0]["loss_soft"]
    assert main(["distill", str(path), f"distill.student={student}", "distill.resume=false"]) == 0
    assert rows(path, "train")[-6]["loss_soft"] < 0.5 * fresh
    folder = load_recipe(str(path)).model_dir("distill")
    assert load_model(folder, architecture == "gpt2").config.num_hidden_layers == 1
    record = read_artifact(folder, "model")
    assert record["parents"]["teacher"] == content_hash(load_recipe(str(path)).model_dir("pretrain"))


def test_the_teacher_does_not_change(with_teacher):
    path = with_teacher()
    folder = load_recipe(str(path)).model_dir("pretrain")
    before = load_file(folder / "model.safetensors")
    assert main(["distill", str(path)]) == 0
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_student_of_its_own_shape(with_teacher, capfd):
    path = with_teacher()
    shape = "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
    narrow = f"distill.student={{config: {shape}}}"
    assert main(["distill", str(path), narrow]) == 2
    assert "distill.weights.hidden=0" in capfd.readouterr().err
    assert main(["distill", str(path), narrow, "distill.weights.hidden=0"]) == 0
    assert "loss_hidden" not in rows(path, "train")[-1]
    assert load_model(load_recipe(str(path)).model_dir("distill"), False).config.hidden_size == 16


def test_another_vocabulary_is_refused_by_name(with_teacher, written_recipe, tiny_recipe, tmp_path, capfd):
    teacher = load_recipe(str(with_teacher())).model_dir("pretrain")
    tree = tiny_recipe(tmp_path / "other")
    tree["prepare"]["tokenizer"]["vocab_size"] = 300
    tree["distill"]["teacher"] = str(teacher)
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps(tree))
    assert main(["prepare", str(other)]) == 0
    assert main(["distill", str(other)]) == 2
    said = capfd.readouterr().err
    assert "one vocabulary for models and data" in said and "Traceback" not in said


def test_distillation_resumes_like_pretraining(with_teacher, monkeypatch):
    path = with_teacher()
    assert main(["distill", str(path)]) == 0
    folder = load_recipe(str(path)).stage_dir("distill")
    unbroken = load_file(folder / "model" / "model.safetensors")
    assert main(["distill", str(path), "distill.resume=false", "distill.save_every_steps=2"]) == 0
    import trainer.engine.loop as loop

    real = loop.take_step

    def stop_at_4(run, step, *rest):
        if step == 4:
            raise KeyboardInterrupt
        return real(run, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stop_at_4)
        assert main(["distill", str(path), "distill.resume=false", "distill.save_every_steps=2"]) == 130
    assert main(["distill", str(path), "distill.save_every_steps=2"]) == 0
    assert [row["step"] for row in rows(path, "resume")] == [4]
    resumed = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)

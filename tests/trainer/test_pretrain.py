import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, modeling_utils

import trainer.heads
from trainer.__main__ import main
from trainer.artifact import read_artifact
from trainer.config import Recipe
from trainer.data.packing import PackedRows
from trainer.data.stream import TrainStream
from trainer.engine.engine import Engine
from trainer.errors import UserError
from trainer.recipe_file import load_recipe

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
OTHERS = {
    "roberta": ("gpt2", "masked_lm", SMALL),
    "modernbert": ("bert", "masked_lm", SMALL | {"local_attention": 8}),
    "distilbert": ("bert", "masked_lm", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
    "llama": ("gpt2", "causal_lm", SMALL | {"num_key_value_heads": 1}),
}


def rows(recipe_path, event):
    lines = (load_recipe(str(recipe_path)).run_dir / "pretrain" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def losses(recipe_path):
    return [row["loss"] for row in rows(recipe_path, "train")]


def test_transformers_sees_no_padding_without_a_mask_in_a_causal_run(written_recipe, monkeypatch):
    """It would advise a mask, with which it finds no borders of documents; and what fills a row up moves no loss."""
    said = []
    warn = PreTrainedModel.warn_if_padding_and_no_attention_mask
    monkeypatch.setattr(
        PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *inputs: said.append(1) or warn(*inputs)
    )
    monkeypatch.setattr(modeling_utils.logger, "warning_once", lambda text: said.append(text))
    recipe_path = written_recipe("gpt2", max_steps=4, eval_every_steps=4)
    assert main(["pretrain", str(recipe_path)]) == 0
    assert set(said) == {1}  # it looked, and saw none

    monkeypatch.setattr(PackedRows, "_fill", property(lambda self: self.framing.pad))
    padded = written_recipe("gpt2", "padded", max_steps=4, eval_every_steps=4)
    assert main(["pretrain", str(padded)]) == 0
    assert any("attention_mask" in str(text) for text in said)
    assert losses(padded) == losses(recipe_path) and rows(padded, "eval") == rows(recipe_path, "eval")


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_the_model_learns_and_its_folder_opens_anywhere(written_recipe, architecture):
    recipe_path = written_recipe(architecture, max_steps=60, eval_every_steps=30)
    assert main(["pretrain", str(recipe_path)]) == 0
    evaluations = rows(recipe_path, "eval")
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] - 0.2
    accuracy = "accuracy" if architecture == "gpt2" else "masked_accuracy"
    assert 0 <= evaluations[-1][accuracy] <= 1
    assert ("bits_per_byte" in evaluations[-1]) == (architecture == "gpt2")
    folder = load_recipe(str(recipe_path)).model_dir("pretrain")
    auto = AutoModelForCausalLM if architecture == "gpt2" else AutoModelForMaskedLM
    model = auto.from_pretrained(folder)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder))
    record = read_artifact(folder, "model")
    assert record["evidence"][0]["metrics"]["loss"] == evaluations[-1]["loss"]
    assert set(record["parents"]) == {"data", "tokenizer"}


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures_train(written_recipe, architecture):
    tokenizer_of, objective, config = OTHERS[architecture]
    recipe_path = written_recipe(
        tokenizer_of,
        max_steps=3,
        model={"architecture": architecture, "config": config},
        objective={"name": objective},
    )
    assert main(["pretrain", str(recipe_path)]) == 0
    assert len(losses(recipe_path)) == 3


def test_concatenated_rows_train(written_recipe):
    recipe_path = written_recipe("gpt2", data={"sequence_length": 32, "packing": "concatenate"}, max_steps=40)
    assert main(["pretrain", str(recipe_path)]) == 0
    assert losses(recipe_path)[-1] < losses(recipe_path)[0] - 0.2
    assert rows(recipe_path, "train")[-1]["tokens"] == 40 * 8 * 32  # no padding at all


def test_gradient_checkpointing_changes_nothing(written_recipe):
    plain, saving = written_recipe(name="plain"), written_recipe(name="saving", gradient_checkpointing=True)
    for path in (plain, saving):
        assert main(["pretrain", str(path)]) == 0
    assert losses(plain) == losses(saving)


def test_bf16_keeps_parameters_in_fp32_and_stays_near(written_recipe):
    full, half = written_recipe(name="full"), written_recipe(name="half", precision="bf16")
    for path in (full, half):
        assert main(["pretrain", str(path)]) == 0
    assert losses(half) == pytest.approx(losses(full), rel=5e-3)
    assert losses(half) != losses(full)
    weights = load_file(load_recipe(str(half)).model_dir("pretrain") / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_the_loss_in_parts_trains_alike(written_recipe, architecture, monkeypatch):
    """Eight parts or so of a tiny vocabulary, in training and evaluation."""
    whole, parts = written_recipe(architecture, "whole"), written_recipe(architecture, "parts", cross_entropy="chunked")
    assert main(["pretrain", str(whole)]) == 0
    monkeypatch.setattr("trainer.heads._PART_BYTES", 2**14 if architecture == "bert" else 2**16)
    calls = []
    real = trainer.heads._part
    monkeypatch.setattr("trainer.heads._part", lambda *words: calls.append(1) or real(*words))
    assert main(["pretrain", str(parts)]) == 0
    assert len(calls) > 12 * 4
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    ends = [rows(path, "eval")[-1]["loss"] for path in (whole, parts)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


@pytest.mark.slow
def test_compiled_blocks_train_alike(written_recipe):
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    no_dropout = {"architecture": "bert", "config": SMALL | dict.fromkeys(dropouts, 0.0)}
    plain = written_recipe(name="plain", max_steps=4, model=no_dropout)
    compiled = written_recipe(name="compiled", max_steps=4, model=no_dropout, compile=True)
    for path in (plain, compiled):
        assert main(["pretrain", str(path)]) == 0
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def test_continuing_from_a_folder_begins_where_it_ended(written_recipe):
    first = written_recipe(name="first")
    assert main(["pretrain", str(first)]) == 0
    folder = str(load_recipe(str(first)).model_dir("pretrain"))
    second = written_recipe(name="second", model={"init_from": folder})
    assert main(["pretrain", str(second)]) == 0
    assert rows(second, "eval")[0]["loss"] == pytest.approx(rows(first, "eval")[-1]["loss"], rel=1e-6)
    assert "init_from" in read_artifact(load_recipe(str(second)).model_dir("pretrain"))["parents"]


def test_batches_of_small_steps_are_made_together_and_each_once(written_recipe, monkeypatch):
    made, real = [], TrainStream._make
    monkeypatch.setattr(TrainStream, "_make", lambda stream, samples: made.append(samples) or real(stream, samples))
    assert main(["pretrain", str(written_recipe(max_steps=10, global_batch_size=8, micro_batch_size=4))]) == 0
    rows_at_once = [[range(at, at + 4) for at in range(first, first + 64, 4)] for first in (0, 64)]
    assert made == rows_at_once  # eight steps, then those from the ninth on


def test_while_a_gpu_is_at_the_backward_pass_the_next_batches_are_made(written_recipe, monkeypatch):
    """An engine that says that it is on one; the step itself waits for the gradient's norm."""
    seen = []
    backward, step, make_ahead = Engine.backward, Engine.step, TrainStream.make_ahead

    def begun(engine, *rest, **named):
        engine.on_cpu = False
        seen.append("backward")
        backward(engine, *rest, **named)

    monkeypatch.setattr(Engine, "backward", begun)
    monkeypatch.setattr(Engine, "step", lambda engine: seen.append("step") or step(engine))
    monkeypatch.setattr(TrainStream, "make_ahead", lambda stream, of: seen.append(of) or make_ahead(stream, of))
    assert main(["pretrain", str(written_recipe(max_steps=3, global_batch_size=8, micro_batch_size=4))]) == 0
    both = ["backward", "backward"]
    assert seen == [0, *both, 1, "step", 1, *both, 2, "step", 2, *both, "step"]


def test_run_folder_says_what_was_run(written_recipe):
    recipe_path = written_recipe(max_steps=2)
    assert main(["pretrain", str(recipe_path), "pretrain.log_every_steps=2"]) == 0
    folder = load_recipe(str(recipe_path)).stage_dir("pretrain")
    resolved = load_recipe(str(folder / "recipe.yaml"))
    assert resolved == load_recipe(str(recipe_path), ["pretrain.log_every_steps=2"])
    assert json.loads((folder / "launch.json").read_text())["ranks"] == 1
    assert json.loads((folder / "environment.json").read_text())
    assert list((folder / "tensorboard").glob("events.*"))
    row = rows(recipe_path, "train")[0]
    promised = "step samples tokens loss learning_rate grad_norm_before_clip step_time_s mfu peak_memory_gib"
    assert {*promised.split(), "data_wait_share"} <= set(row)
    assert 0 < row["data_wait_share"] < 1
    assert (folder / "checkpoints" / "LATEST").read_text() == "step-00000002\n"


def test_clipping_clips(written_recipe):
    """With SGD-like AdamW steps a clip shows only indirectly, so look at the gradients that the optimizer sees."""
    recipe = load_recipe(str(written_recipe(max_grad_norm=1e-3, max_steps=1)))
    seen = []
    real = torch.optim.AdamW.step

    def look(self, *rest):
        seen.append(torch.nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]]).item())
        return real(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", look)
        from trainer.pretrain import run

        run(recipe)
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


def test_no_terminal_no_bar(written_recipe, capfd):
    assert main(["pretrain", str(written_recipe(max_steps=2))]) == 0
    said = capfd.readouterr().err
    assert "\r" not in said and "━" not in said and "it/s" not in said


def test_users_mistakes_are_one_message(written_recipe, capfd, monkeypatch, tmp_path):
    recipe_path = written_recipe()
    mistakes = {
        "pretrain.model.config.hiden_size=3": "did you mean 'hidden_size'",
        "pretrain.global_batch_size=4": "not a multiple of micro_batch_size 8",
        f"run_dir={tmp_path / 'nowhere'}": "not there or not finished",
        "pretrain.model={architecture: gpt2}": "no masked_lm model",
    }
    for override, message in mistakes.items():
        assert main(["pretrain", str(recipe_path), override]) == 2
        said = capfd.readouterr().err
        assert message in said and "Traceback" not in said
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="one owner of the precision"):
        Engine(load_recipe(str(recipe_path)).pretrain, tmp_path)


def test_a_recipe_without_the_section_is_refused(tmp_path):
    from trainer.pretrain import run

    with pytest.raises(UserError, match="no `pretrain` section"):
        run(Recipe(run_dir=tmp_path))

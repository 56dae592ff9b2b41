"""The whole chain on tiny models and real components: text in, verified and measured ONNX and a report out."""

import json
import os
import signal

import numpy as np
import onnxruntime
import pytest
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from trainer.__main__ import main
from trainer.artifact import read_artifact
from trainer.engine import loop


@pytest.mark.parametrize("architecture", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_chain(tiny_recipe, tmp_path, capsys, architecture):
    tree = tiny_recipe(tmp_path / "run", architecture)
    if architecture == "bert":
        tree["distill"]["student"] = {"architecture": "distilbert", "every": 2}
    # A BERT of so few steps gets no masked token right, which leaves it no quality to keep.
    quality = {"share": 0.9, "sequences": 32, "sequence_length": 16} if architecture == "gpt2" else None
    tree["export"] = {"parity": {"shapes": [[3, 9]]}, "quality": quality}
    tree["pack"] = {"models": ["student"]}
    tree["bench"] = {
        "backends": ["eager", "onnx_fp32", "onnx_int8"],
        "batch_sizes": [1],
        "sequence_lengths": [16],
        "window_s": 0.05,
        "quality_sequences": 8,
        "threads": 1,
        "max_windows": 4,
        "decode": {"new_tokens": 4},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tree))
    assert main(["run", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "report.html" in said
    run_dir = tmp_path / "run"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["parity_passed"] is True
    assert summary["student_parameters"] < summary["teacher_parameters"]
    latencies = [summary["teacher_latency_ms"], summary["student_latency_ms"]]
    if None not in latencies:  # on a busy machine rows may be without figures
        assert summary["speedup"] == pytest.approx(latencies[0] / latencies[1], rel=1e-3)
    assert summary["teacher_loss"] > 0 and summary["student_loss"] > 0 and summary["seconds"] > 0
    assert_opens_elsewhere(run_dir, architecture)
    packed = read_artifact(run_dir / "pack" / "student", "packed")
    assert packed["parents"]["onnx"] == read_artifact(run_dir / "export" / "student")["content_sha256"]

    assert main(["run", str(recipe)]) == 0
    chain = json.loads((run_dir / "chain.json").read_text())["stages"]
    assert all(stage["skipped"] for stage in chain.values())


def test_the_chain_trains_a_changed_stage_anew_and_goes_on_with_a_stopped_one(
    tiny_recipe, tmp_path, capfd, monkeypatch
):
    tree = tiny_recipe(tmp_path / "run")
    del tree["distill"]
    recipe, stage = tmp_path / "recipe.yaml", tmp_path / "run" / "pretrain"
    recipe.write_text(json.dumps(tree))

    def steps_of_checkpoints(folder):
        return sorted(int(path.name.removeprefix("step-")) for path in (stage / folder).glob("step-*"))

    assert main(["run", str(recipe)]) == 0
    assert steps_of_checkpoints("checkpoints") == [8, 12]

    changed = ["run", str(recipe), "pretrain.max_steps=10", "pretrain.optim.learning_rate=1e-3"]
    real = loop.take_step
    with monkeypatch.context() as patch:  # the changed stage is stopped in the middle
        patch.setattr(loop, "take_step", lambda run, step, *rest: (step == 5 and stop(), real(run, step, *rest))[1])
        assert main(changed) == 75
    assert (steps_of_checkpoints("checkpoints-aside"), steps_of_checkpoints("checkpoints")) == ([8, 12], [4, 6])
    said = capfd.readouterr().err
    assert "optim.learning_rate: 0.005 there, 0.001 now" in said and "pretrain begins at step 0" in said
    assert read_artifact(stage / "model")["about"]["steps"] == 12  # the old model stays until there is a new one

    assert main([*changed, "pretrain.log_every_steps=2"]) == 0  # and goes on where it was, also with other free keys
    assert [path.name for path in sorted(stage.glob("checkpoints*"))] == ["checkpoints", "checkpoints-aside"]
    events = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in events if row["event"] == "resume"] == [6]
    assert read_artifact(stage / "model")["about"]["steps"] == 10


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def assert_opens_elsewhere(run_dir, architecture):
    """transformers opens the model folder, onnxruntime the exported one, and they say the same."""
    auto = AutoModelForCausalLM if architecture == "gpt2" else AutoModelForMaskedLM
    for name, stage in (("teacher", "pretrain"), ("student", "distill")):
        model = auto.from_pretrained(run_dir / stage / "model").eval()
        tokenizer = AutoTokenizer.from_pretrained(run_dir / stage / "model")
        session = onnxruntime.InferenceSession(run_dir / "export" / name / "model.onnx")
        batch = tokenizer(["abc def gha", "ij"], return_tensors="pt", padding=True)
        feeds = {item.name: batch[item.name].numpy() for item in session.get_inputs() if item.name in batch}
        if "token_type_ids" in {item.name for item in session.get_inputs()}:
            feeds["token_type_ids"] = np.zeros_like(feeds["input_ids"])
        if "position_ids" in {item.name for item in session.get_inputs()}:
            length = batch["input_ids"].shape[1]
            feeds["position_ids"] = np.arange(length)[None].repeat(2, axis=0)
        for item in session.get_inputs():  # a decoder's past, of which there is none yet
            if item.name.startswith("past_key_values."):
                feeds[item.name] = np.zeros((2, item.shape[1], 0, item.shape[3]), dtype=np.float32)
        (logits,) = session.run(["logits"], feeds)
        expected = model(**{key: value for key, value in batch.items() if key != "token_type_ids"}).logits
        real = batch["attention_mask"].bool().numpy()
        np.testing.assert_allclose(logits[real], expected.detach().numpy()[real], atol=1e-4)

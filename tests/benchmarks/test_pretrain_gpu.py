"""The pretraining benchmark for a GPU, on models small enough for any machine: all of it runs, and says what failed."""

import json

import pretrain_gpu
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.environment import peak_flops
from trainer.models import train_flops


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Runs the benchmark and returns what it wrote, and its exit code."""

    def run(*words):
        code = pretrain_gpu.main(["--smoke", "--no-compile", "--rounds", "1", "--out", str(tmp_path / "out"), *words])
        return json.loads((tmp_path / "out").read_text()), code

    return run


def test_all_sides_train_both_models_in_turns(report):
    got, code = report()
    assert code == 0 and set(got["results"]) == {"gpt2", "bert"}
    assert got["versions"]["torch"] == torch.__version__
    for result in got["results"].values():
        (only,) = result["rounds"]  # the first, which compiles, does not count
        assert set(result["tokens_per_s"]) == {"ours", "bare", "trainer"} and not result["failed"]
        assert all(figure > 0 for figure in result["tokens_per_s"].values())
        assert result["ours_to_trainer"] == pytest.approx(only["ours"] / only["trainer"])
        flops = result["tokens_per_s"]["bare"] * result["flops_per_token"]
        assert result["mfu_of_matmul"]["bare"] == pytest.approx(flops / only["matmul_flops"])


def test_a_side_that_fails_is_named_and_the_others_are_measured(report, monkeypatch):
    def fail(self):
        raise RuntimeError("planted")

    monkeypatch.setattr(pretrain_gpu.Theirs, "window", fail)
    got, code = report("--model", "gpt2")
    result = got["results"]["gpt2"]
    assert code == 1 and result["failed"] == {"trainer": "RuntimeError: planted"}
    assert set(result["tokens_per_s"]) == {"ours", "bare"}
    assert result["ours_to_trainer"] is None and result["ours_to_bare"] > 0


def test_mfu_is_that_of_a_gpt2_on_the_datasheet():
    """GPT-2 124M with nanoGPT's padded vocabulary: 6 N + 12 L D T a token, by hand."""
    size = pretrain_gpu.SIZES["gpt2"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **size.config))
    flops = train_flops(model, size.sequence_length).of(1, 1)
    assert flops == 6 * (124_475_904 - 1024 * 768) + 12 * 12 * 768 * 1024
    rounds = [{"ours": 4e5, "bare": 4e5, "trainer": 2e5, "matmul_flops": 8e14, "cpu_share": 1.0}]
    result = pretrain_gpu.summarize(rounds, flops, peak_flops("NVIDIA H100 80GB HBM3", "bf16"))
    assert result["mfu_of_datasheet"]["ours"] == pytest.approx(0.3458, abs=1e-4)
    assert result["mfu_of_matmul"]["ours"] == pytest.approx(0.4277, abs=1e-4)
    assert result["ours_to_trainer"] == 2.0

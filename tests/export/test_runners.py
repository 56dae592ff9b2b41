"""The runner's one face: backends agree on real inputs, and what was asked for is what runs."""

import subprocess
import sys

import numpy as np
import pytest

from export.io_spec import TASKS, read_spec, spec_of
from export.runners import open_onnx, open_runner, open_torch
from export.to_onnx import replace_conv1d
from tests.export.conftest import CONFIGS, MAX_LENGTH, build_model
from trainer.errors import UserError

HEADS = {
    "bert_classifier": {"logits": ("batch_size", 3)},
    "bert_features": {"last_hidden_state": ("batch_size", "sequence_length", 32)},
    "roberta_tokens": {"logits": ("batch_size", "sequence_length", 5)},
    "bert_answers": {name: ("batch_size", "sequence_length") for name in ("start_logits", "end_logits")},
}
# Layers, heads of keys and values, and their size, as the configs of these tiny models have them.
CACHES = {"gpt2": (2, 4, 8), "llama": (2, 2, 8), "mistral": (2, 2, 8), "qwen2": (2, 2, 8), "qwen3": (2, 2, 16)}


@pytest.fixture(scope="module")
def exported(raw_graph):
    """A raw export of the tiny BERT."""
    return raw_graph("bert").parent


@pytest.mark.parametrize("name", CONFIGS)
def test_spec_follows_optimums_names(name, model_folder):
    """Names and axes as in optimum's OnnxConfig classes, which cannot be installed beside transformers 5."""
    spec = read_spec(model_folder(name))
    length = "past_sequence_length + sequence_length" if name in CACHES else "sequence_length"
    inputs = {"input_ids": ("batch_size", "sequence_length"), "attention_mask": ("batch_size", length)}
    outputs = dict(HEADS.get(name, {"logits": ("batch_size", "sequence_length", 300)}))
    if spec.model_type == "bert":
        inputs["token_type_ids"] = ("batch_size", "sequence_length")
    if name in CACHES:
        inputs["position_ids"] = ("batch_size", "sequence_length")
        layers, heads, size = CACHES[name]
        for pair in [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]:
            inputs[f"past_key_values.{pair}"] = ("batch_size", heads, "past_sequence_length", size)
            outputs[f"present.{pair}"] = ("batch_size", heads, length, size)
    assert [(port.name, port.axes) for port in spec.inputs] == list(inputs.items())
    assert [(port.name, port.axes) for port in spec.outputs] == list(outputs.items())
    assert spec.max_length == MAX_LENGTH
    assert spec.architecture in TASKS


def test_spec_refuses_what_it_does_not_know():
    config = build_model("bert").config
    config.architectures = ["BertForMultipleChoice"]
    with pytest.raises(UserError, match=r"(?s)BertForMultipleChoice .*one of BertForMaskedLM, .*LlamaForCausalLM"):
        spec_of(config)


def test_positions_count_real_tokens(model_folder):
    spec = read_spec(model_folder("gpt2"))
    mask_BT = np.array([[0, 0, 1, 1], [1, 1, 1, 0]])
    feeds = spec.feeds(np.ones((2, 4), dtype=np.int64), mask_BT)
    assert feeds["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
    assert {value.shape for name, value in feeds.items() if name.startswith("past")} == {(2, 4, 0, 8)}
    past = {name: np.ones((2, 4, 3, 8), dtype=np.float32) for name in spec.cache.past_names}
    later = spec.feeds(np.ones((2, 1), dtype=np.int64), mask_BT, past)
    assert later["position_ids"].tolist() == [[1], [2]] and later["attention_mask"].shape == (2, 4)
    assert list(later) == [port.name for port in spec.inputs] and later["past_key_values.1.value"].shape[2] == 3


@pytest.mark.slow  # compiles C++
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_both_graphs_of_a_pair_are_compiled(name, model_folder):
    """A first step and a later one, on texts of two lengths."""
    folder = model_folder(name)
    spec = read_spec(folder)
    eager, compiled = (open_runner(folder, backend, 1, spec=spec) for backend in ("eager", "compile"))
    for length in (15, 9):
        inputs = spec.reader.pad([np.arange(5, 5 + length), np.arange(30, 37)], length)
        for ids in (np.full((2, 1), spec.start_id), np.array([[spec.start_id, 7, 8], [spec.start_id, 9, 10]])):
            feeds = inputs | {"decoder_input_ids": ids}
            for output, value in eager.run(feeds).items():
                error = np.abs(compiled.run(feeds)[output] - value).max()
                assert error <= max(1e-5, 2e-6 * np.abs(value).max()), output  # keys are as large as 7


@pytest.mark.slow  # compiles C++
def test_backends_agree(exported, model_folder):
    spec = read_spec(model_folder("bert"))
    inputs = spec.pad([np.arange(5, 20), np.arange(30, 37)], 15)
    runners = [
        open_runner(model_folder("bert"), "eager", 1),
        open_runner(model_folder("bert"), "compile", 1),
        open_runner(exported, "onnx_fp32", 1),
    ]
    eager, compiled, onnx_fp32 = (runner.run(inputs)["logits"][inputs["attention_mask"] == 1] for runner in runners)
    np.testing.assert_allclose(compiled, eager, atol=1e-5)
    np.testing.assert_allclose(onnx_fp32, eager, atol=1e-5)


def test_conv1d_becomes_an_equal_linear(model_folder):
    folder = model_folder("gpt2")
    spec = read_spec(folder)
    inputs = spec.pad([np.arange(5, 30)], 25)
    before = open_torch(folder, 1)
    expected = before.run(inputs)["logits"]
    replace_conv1d(before.call.model)
    assert not [module for module in before.call.modules() if type(module).__name__ == "Conv1D"]
    np.testing.assert_allclose(before.run(inputs)["logits"], expected, atol=1e-5)


def test_a_provider_that_is_not_there_is_an_error(exported):
    with pytest.raises(UserError, match=r"this ONNX Runtime has .*CPUExecutionProvider\nNeeded: CUDAExecutionProvider"):
        open_onnx(exported / "model.onnx", 1, provider="CUDAExecutionProvider")


def test_thread_count_is_what_was_asked(exported):
    assert open_onnx(exported / "model.onnx", 3).session.get_session_options().intra_op_num_threads == 3


def test_a_missing_graph_is_an_error(exported):
    with pytest.raises(UserError, match=r"model_quantized.onnx is not there"):
        open_runner(exported, "onnx_int8", 1)


def test_onnx_backends_do_not_load_torch(exported):
    """Else their peak memory in the benchmark would be torch's."""
    code = (
        "import sys; from pathlib import Path; from export import bench_worker; from export.runners import open_runner;"
        f"open_runner(Path({str(exported)!r}), 'onnx_fp32', 1); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

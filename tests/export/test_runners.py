"""The runner's one face: backends agree on real inputs, and what was asked for is what runs."""

import subprocess
import sys

import numpy as np
import pytest

from export.io_spec import TASKS, read_spec, spec_of
from export.runners import open_onnx, open_runner, open_torch
from export.to_onnx import export_graph, load_model, replace_conv1d
from tests.export.conftest import CONFIGS, MAX_LENGTH, build_model
from trainer.errors import UserError

THIRD = {"bert": ["token_type_ids"], "gpt2": ["position_ids"], "llama": ["position_ids"]}


@pytest.fixture(scope="module")
def exported(model_folder, tmp_path_factory):
    """A raw export of the tiny BERT."""
    folder = tmp_path_factory.mktemp("exported")
    spec = read_spec(model_folder("bert"))
    export_graph(load_model(model_folder("bert"), spec), spec, folder / "model.onnx", 20)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_spec_follows_optimums_names(name, model_folder):
    spec = read_spec(model_folder(name))
    assert [port.name for port in spec.inputs] == ["input_ids", "attention_mask", *THIRD.get(spec.model_type, [])]
    assert {port.axes for port in spec.inputs} == {("batch_size", "sequence_length")}
    classes = ("batch_size", 3) if name == "bert_classifier" else ("batch_size", "sequence_length", 300)
    assert [(port.name, port.axes) for port in spec.outputs] == [("logits", classes)]
    assert spec.max_length == MAX_LENGTH
    assert spec.architecture in TASKS


def test_spec_refuses_what_it_does_not_know():
    config = build_model("bert").config
    config.architectures = ["BertForTokenClassification"]
    with pytest.raises(UserError, match=r"(?s)BertForTokenClassification .*one of BertForMaskedLM, .*LlamaForCausalLM"):
        spec_of(config)


def test_positions_count_real_tokens(model_folder):
    spec = read_spec(model_folder("gpt2"))
    mask_BT = np.array([[0, 0, 1, 1], [1, 1, 1, 0]])
    feeds = spec.feeds(np.ones((2, 4), dtype=np.int64), mask_BT)
    assert feeds["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


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
    with pytest.raises(UserError, match="ONNX Runtime took CPUExecutionProvider"):
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

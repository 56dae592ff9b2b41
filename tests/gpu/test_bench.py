"""The benchmark on a GPU: ONNX Runtime's nodes run there, PyTorch's rows too, and both say what the CPU says."""

import numpy as np
import onnxruntime
import pytest
import torch

from export.energy import joules_per_call, open_counter
from export.io_spec import read_spec
from export.provider_audit import audit
from export.runners import open_onnx, open_torch, open_torch_pair
from export.windows import SystemClock
from tests.export.conftest import model_folder, raw_graph  # noqa: F401 - fixtures

CUDA = "CUDAExecutionProvider"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu")
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_all_that_computes_runs_on_the_gpu(name, raw_graph, model_folder):  # noqa: F811
    inputs = read_spec(model_folder(name)).pad([np.arange(5, 20), np.arange(5, 11)], 15)
    found = audit(raw_graph(name), CUDA, 1, inputs)
    assert found.strayed == {}
    assert found.nodes[CUDA] > found.nodes.get("CPUExecutionProvider", 0)
    runners = (open_onnx(raw_graph(name), 1, provider) for provider in (CUDA, "CPUExecutionProvider"))
    logits = [runner.run(inputs)["logits"] for runner in runners]
    np.testing.assert_allclose(logits[0][0], logits[1][0], atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2"])
def test_pytorch_rows_run_on_the_gpu(name, model_folder):  # noqa: F811
    folder = model_folder(name)
    inputs = read_spec(folder).pad([np.arange(5, 20)], 15)
    there, here = open_torch(folder, 1, device="cuda"), open_torch(folder, 1)
    assert next(there.call.parameters()).is_cuda
    np.testing.assert_allclose(there.run(inputs)["logits"], here.run(inputs)["logits"], atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_pairs_in_pytorch_run_on_the_gpu(name, model_folder):  # noqa: F811
    folder = model_folder(name)
    inputs = read_spec(folder).reader.pad([np.arange(5, 20), np.arange(5, 9)], 15)
    there, here = open_torch_pair(folder, 1, device="cuda"), open_torch_pair(folder, 1)
    np.testing.assert_allclose(there.run(inputs)["logits"], here.run(inputs)["logits"], atol=1e-4)


def test_the_card_s_own_counter_gives_joules():
    """Products without a pause draw more than nothing and less than any card's limit."""
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    counter, reason = open_counter()
    if counter is None:
        pytest.skip(reason)
    matrix = torch.randn(4096, 4096, device="cuda")

    def call():
        for _ in range(50):
            matrix @ matrix
        torch.cuda.synchronize()

    call()
    clock = SystemClock()
    began_s = clock.wall_s()
    calls = 0

    def counted():
        nonlocal calls
        call()
        calls += 1

    joules = joules_per_call(counted, counter, clock)
    if isinstance(joules, str):
        pytest.skip(joules)
    assert 20 < joules * calls / (clock.wall_s() - began_s) < 1500

"""Exported graphs on ONNX Runtime's CUDA provider, against the same graphs on its CPU."""

import numpy as np
import pytest

from export.io_spec import read_spec
from export.runners import open_onnx
from tests.export.conftest import model_folder, raw_graph  # noqa: F401 - fixtures

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
PROVIDER = "CUDAExecutionProvider"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        PROVIDER not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu, and a GPU"
    ),
]


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "llama"])
def test_cuda_gives_what_the_cpu_gives(name, model_folder, raw_graph):  # noqa: F811
    """In fp32: the provider's own default would be TF32."""
    path, spec = raw_graph(name), read_spec(model_folder(name))
    rows = [np.arange(5, 38, dtype=np.int64), np.arange(60, 71, dtype=np.int64)]
    inputs = spec.pad(rows, 40)
    seen = inputs["attention_mask"][:, -40:].astype(bool)
    there, here = (open_onnx(path, 1, provider).run(inputs) for provider in (PROVIDER, "CPUExecutionProvider"))
    assert there.keys() == here.keys()
    ours, theirs = there["logits"][seen], here["logits"][seen]
    assert np.sqrt(np.square(ours - theirs).mean()) < 1e-5 * np.sqrt(np.square(theirs).mean())

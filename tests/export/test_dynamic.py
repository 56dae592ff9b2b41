"""int8 with activations quantized as they come: ONNX Runtime's own nodes and numbers, without its copies of a graph."""

import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from export.cases import make_cases
from export.dynamic import quantize
from export.files import data_file, save_graph
from export.io_spec import read_spec
from export.quantize import quantizable
from export.runners import open_onnx
from trainer.export_config import Parity


@pytest.mark.parametrize("name", ["bert", "gpt2", "bert_classifier"])
def test_products_have_the_nodes_and_numbers_of_onnx_runtimes_own(name, model_folder, raw_graph, documents, tmp_path):
    """A tied head, products with a bias (Gemm); tables of words and positions are given to it as ours hold them."""
    ours, prepared, theirs = (tmp_path / f"{which}.onnx" for which in ("ours", "prepared", "theirs"))
    quantize(raw_graph(name), ours)
    model = quantizable(raw_graph(name))
    looked_up = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    tables = [one for one in model.graph.initializer if one.name in looked_up and one.data_type == TensorProto.FLOAT]
    assert len(tables) == (2 if name == "gpt2" else 3)
    for table in tables:
        table.CopyFrom(numpy_helper.from_array(as_held(table, ours), table.name))
    save_graph(model, prepared)
    settings = {"per_channel": True, "reduce_range": True, "extra_options": {"DefaultTensorType": TensorProto.FLOAT}}
    quantize_dynamic(prepared, theirs, ["MatMul"], weight_type=QuantType.QInt8, **settings)
    made, wanted = (Counter(node.op_type for node in onnx.load(path).graph.node) for path in (ours, theirs))
    lookups = Counter({kind: len(tables) for kind in ("Gather", "Cast", "Mul")})
    assert made == wanted + lookups and made["MatMulInteger"] >= 8
    spec = read_spec(model_folder(name))
    for case in make_cases(documents, spec, Parity().shapes, longest=1024):
        expected, found = (open_onnx(path, 1).run(case.inputs) for path in (theirs, ours))
        for output in expected:
            np.testing.assert_allclose(found[output], expected[output], atol=2e-6)


def as_held(table, file):
    """An embedding table as an int8 file has it: each row within half a step of its own."""
    held = {one.name: numpy_helper.to_array(one) for one in onnx.load(file).graph.initializer}
    integers, scales = (held[f"{table.name}_table_{part}"] for part in ("quantized", "scale"))
    assert integers.dtype == np.int8 and scales.shape == (len(integers), 1)
    values, wanted = integers * scales, numpy_helper.to_array(table)
    assert (np.abs(values - wanted) <= np.abs(wanted).max(axis=1, keepdims=True) / 127 * 0.501).all()
    return values.astype(np.float32)


_MEASURED = """
import sys
from pathlib import Path
from export.dynamic import quantize
# Not getrusage's: that begins with what the parent held.
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
quantize(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak() - before)
"""


def test_a_large_graph_is_never_in_memory_as_a_whole(tmp_path):
    """Weights beside the graph, as of all graphs above 2 GB. ONNX Runtime's own took three times the file."""
    size, layers = 1024, 24
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal((size, size), dtype=np.float32) / 32, f"w{index}")
        for index in range(layers)
    ]
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], name=f"m{i}") for i in range(layers)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name in ("x0", f"x{layers}")]
    graph = helper.make_graph(nodes, "large", ports[:1], ports[1:], weights)
    raw = tmp_path / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, raw, save_as_external_data=True, location=data_file(raw).name, size_threshold=1024)
    command = [sys.executable, "-c", _MEASURED, str(raw), str(tmp_path / "int8.onnx")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert 0.2 < grown / data_file(raw).stat().st_size < 1
    inputs = {"x0": random.standard_normal((1, size), dtype=np.float32)}
    found, expected = (open_onnx(path, 1).run(inputs)[f"x{layers}"] for path in (tmp_path / "int8.onnx", raw))
    assert np.linalg.norm(found - expected) < 0.2 * np.linalg.norm(expected)

"""Where nodes ran is read from ONNX Runtime's own profile, and a node that went elsewhere is named."""

import numpy as np
import onnx
import pytest

from export.io_spec import read_spec
from export.provider_audit import Audit, audit, read_profile
from trainer.errors import UserError

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


def node(name, op_name, provider, *outputs):
    args = {"op_name": op_name, "provider": provider, "output_type_shape": [{kind: shape} for kind, shape in outputs]}
    return {"cat": "Node", "name": name, "args": args}


@pytest.fixture(scope="module")
def inputs(model_folder):
    return read_spec(model_folder("bert")).pad([np.arange(5, 20), np.arange(5, 11)], 15)


def test_every_node_of_a_real_session_is_seen(raw_graph, inputs):
    found = audit(raw_graph("bert"), CPU, 1, inputs)
    assert found.strayed == {} and found.reason(CPU) == ""
    assert set(found.nodes) == {CPU}
    products = sum(node.op_type == "MatMul" for node in onnx.load(raw_graph("bert")).graph.node)
    assert 0 < products < found.nodes[CPU]


def test_a_session_that_fell_to_the_cpu_is_caught(raw_graph, inputs):
    """ONNX Runtime opens it on this provider, says so, and runs everything on the CPU."""
    found = audit(raw_graph("bert"), "AzureExecutionProvider", 1, inputs)
    assert found.nodes.keys() == {CPU}
    assert "MatMul" in found.strayed or "FusedMatMul" in found.strayed or "Gemm" in found.strayed
    assert "Shape" not in found.strayed
    assert found.reason("AzureExecutionProvider").startswith(f"{sum(found.strayed.values())} of {found.nodes[CPU]} ")


def test_nothing_is_left_of_the_profile(raw_graph, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    audit(raw_graph("bert"), CPU, 1, inputs)
    assert list(tmp_path.iterdir()) == []


def test_nodes_that_reckon_with_shapes_may_stay_on_the_cpu():
    events = [
        {"cat": "Session", "name": "model_run", "args": {}},
        node("MatMul_0", "MatMul", CUDA, ("float", [2, 8])),
        node("Shape_1", "Shape", CPU, ("int64", [2])),
        node("Gather_2", "Gather", CPU, ("int64", [])),
        node("Where_3", "Where", CPU, ("int64", [2, 8])),
        node("Softmax_4", "Softmax", CPU, ("float", [2])),
        node("TopK_5", "TopK", CPU, ("int64", [2]), ("float", [2])),
        node("Softmax_6", "Softmax", CPU, ("float16", [2, 8])),
    ]
    found = read_profile(events, CUDA)
    assert found.nodes == {CPU: 6, CUDA: 1}
    assert found.strayed == {"Softmax": 2, "Where": 1, "TopK": 1}
    assert found.reason(CUDA) == f"4 of 7 nodes did not run on {CUDA}: 2 Softmax, 1 Where, 1 TopK"


def test_a_node_that_a_loop_runs_again_counts_once():
    events = [node("Add_0", "Add", CPU, ("float", [3]))] * 5
    assert read_profile(events, CUDA) == Audit({CPU: 1}, {"Add": 1})


def test_a_provider_that_is_not_installed_is_an_error(raw_graph, inputs):
    with pytest.raises(UserError, match=f"Needed: {CUDA}"):
        audit(raw_graph("bert"), CUDA, 1, inputs)


def test_what_tensorrt_leaves_to_cuda_is_as_asked_and_what_falls_to_the_cpu_is_not():
    def node(name, provider):
        outputs = [{"float": [2, 3]}]
        return {"name": name, "args": {"provider": provider, "op_name": name, "output_type_shape": outputs}}

    on_both = [node("TRTKernel", "TensorrtExecutionProvider"), node("Gather", "CUDAExecutionProvider")]
    assert read_profile(on_both, "TensorrtExecutionProvider").strayed == {}
    fallen = [*on_both, node("Einsum", "CPUExecutionProvider")]
    assert read_profile(fallen, "TensorrtExecutionProvider").strayed == {"Einsum": 1}
    assert read_profile(on_both, "CUDAExecutionProvider").strayed == {"TRTKernel": 1}

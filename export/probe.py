"""A graph's inner values: what every node puts out for given inputs, as ONNX Runtime computes it without fusing.
Ranges for fp16 (`precision`) and the search for a node that departs (`bisect`) are made of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.runners import Arrays

# Inputs of more tokens are not probed: all inner values at once would fill the memory.
MOST_TOKENS = 512


class Probe:
    """A graph file opened with every node's outputs as outputs of the graph.

    The file that this takes lies beside the graph's, so that external data is found, and is gone after opening.
    """

    def __init__(self, path: Path, threads: int) -> None:
        model = onnx.load(path, load_external_data=False)
        inner = [name for node in model.graph.node if not _makes_bf16(node) for name in node.output if name]
        declared = {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner if name not in declared)
        opened = path.with_name(f".probe-{path.name}")
        onnx.save(model, opened)
        try:
            self.session = _open(opened, threads)
        finally:
            opened.unlink()
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.names = [value.name for value in self.session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Every node's outputs by name, whatever their types."""
        return dict(zip(self.names, self.session.run(None, dict(inputs)), strict=True))


def _makes_bf16(node: onnx.NodeProto) -> bool:
    """Whether a node of `precision`'s rounding graph puts out what numpy has no type for."""
    return any(one.name == "to" and one.i == onnx.TensorProto.BFLOAT16 for one in node.attribute)


def _open(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

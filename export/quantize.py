"""int8 weights and dynamically quantized activations from a raw graph, with the output head made quantizable first.
Whether the result is good enough is the parity gate's decision.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

# Type the quantizer assumes where its shape inference knows nothing.
_EXTRA_OPTIONS = {"DefaultTensorType": onnx.TensorProto.FLOAT}


def quantize(raw: Path, quantized: Path) -> None:
    """Write an int8 form of graph `raw`: weights of MatMul by output channel, embedding tables whole.

    Fusing attention first (`onnxscript.rewriter.ort_fusions`) was measured and gains nothing: ONNX Runtime fuses the
    rest itself when it loads. Medians in interleaved windows, 2 threads: BERT-base 1 x 128 50.8 ms as here against
    51.8 fused, 4 layers of GPT-2 8 x 128 27.1 against 31.6. The result keeps to standard operators.
    """
    graph = onnx.load(raw)
    untie(graph)
    # The exporter records shapes here that contradict the quantizer's own inference, which then stops.
    del graph.graph.value_info[:]
    onnx.checker.check_model(graph)
    with _only_errors():
        quantize_dynamic(
            graph,
            quantized,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # 7-bit weights: x86 CPUs without VNNI add pairs of products in 16 bits, which 8-bit weights overflow
            # (ONNX Runtime's documentation, "Quantize ONNX models"). A model travels to CPUs that nobody tested, and
            # the price is small: relative_rms 0.0026 to 0.0027 on a trained tiny BERT, 0.0050 to 0.0060 on GPT-2.
            reduce_range=True,
            extra_options=dict(_EXTRA_OPTIONS),
        )


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """The quantizer advises, on the root logger, to run a preparation that was found to be of no use here."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def untie(model: onnx.ModelProto) -> int:
    """Give every head that multiplies by a transposed table its own copy of it; returns how many there were.

    Left tied, the quantizer skips the head, or dequantizes the whole table at each call (measured on GPT-2: 4x slower).
    """
    graph = model.graph
    tables = {initializer.name: initializer for initializer in graph.initializer}
    transposed = {
        node.output[0]: tables[node.input[0]]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in tables and len(tables[node.input[0]].dims) == 2
    }
    heads = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in transposed]
    for index, node in enumerate(heads):
        weight_HV = np.ascontiguousarray(numpy_helper.to_array(transposed[node.input[1]]).T)
        node.input[1] = f"untied_head_{index}"
        graph.initializer.append(numpy_helper.from_array(weight_HV, node.input[1]))
    used = {name for node in graph.node for name in node.input}
    for node in [node for node in graph.node if node.output[0] in transposed and node.output[0] not in used]:
        graph.node.remove(node)
    return len(heads)

"""The int8 form of a raw graph whose activations are quantized by calibrated ranges, and int4 weights.
The output head is made quantizable first. Whether a result is good enough is the parity gate's decision.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    create_calibrator,
    quantize_static,
)
from onnxruntime.quantization.quantize import save_tensors_data

from export.decoding_graph import for_decoding
from export.dynamic import round_tables
from export.files import data_file, save_graph
from trainer.export_config import Calibration

# Type the quantizer assumes where its shape inference knows nothing.
_EXTRA_OPTIONS = {"DefaultTensorType": onnx.TensorProto.FLOAT}
_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
# Bins of a tensor's histogram. ONNX Runtime's own default for entropy is as many as it has quantized ones, 128, which
# leaves the search a single candidate, the whole range.
_BINS = {"minmax": {}, "entropy": {"num_bins": 512}, "percentile": {"num_bins": 2048}}
# Weights that share one scale. Relative_rms of a trained 5 M GPT-2: 0.108 with 32, 0.112 with 64, 0.140 with 128.
_INT4_BLOCK = 64


def quantize_by_ranges(
    raw: Path, quantized: Path, batches: Sequence[Mapping[str, np.ndarray]], settings: Calibration
) -> None:
    """Write an int8 form with quantize and dequantize nodes around each product: QDQ.

    Ranges are those of the activations in `batches`. Attention's products are quantized like those by weights, so that
    an engine has no other; leaving them out gains little (relative_rms of a tiny BERT 0.050 instead of 0.057) and no
    time on the CPU. What are no products stays in fp32.
    """
    with _only_errors(), tempfile.TemporaryDirectory() as scratch:
        prepared, ranges, written = (Path(scratch, name) for name in ("raw.onnx", "ranges.json", "quantized.onnx"))
        save_graph(quantizable(raw), prepared)
        calibrator = create_calibrator(
            prepared,
            ["MatMul"],
            augmented_model_path=str(Path(scratch, "augmented.onnx")),
            calibrate_method=_METHODS[settings.method],
            extra_options={**_BINS[settings.method], "symmetric": False, "percentile": settings.percentile},
        )
        for batch in batches:  # one by one, as its histograms take no two shapes at once
            calibrator.collect_data(_One(batch))
        save_tensors_data(calibrator.compute_data(), ranges)
        quantize_static(
            prepared,
            written,
            None,
            use_external_data_format=data_file(raw).is_file(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,  # as in `dynamic`
            activation_type=QuantType.QInt8 if settings.symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
            calibrate_method=_METHODS[settings.method],
            calibration_cache_path=ranges,
            extra_options={**_EXTRA_OPTIONS, "ActivationSymmetric": settings.symmetric},
        )
        save_graph(onnx.load(written), quantized)


def quantize_weights(raw: Path, quantized: Path, fused: bool = False) -> None:
    """Write a form whose products take int4 weights in blocks of 64 and int8 activations (MatMulNBits), its embedding
    tables in int8; `fused`: with `decoding_graph`.

    It pays where weights must be read for few tokens, in decoding: GPT-2 124M, 2 threads, 373 tokens/s against 263 with
    int8 and 77 in fp32 (tests/benchmarks/decode.py); blocks of 32 are a quarter slower. At 128 tokens it is slower than
    int8 (BERT-base: 108 ms against 45).
    """
    graph = quantizable(raw, fused)
    with _only_errors():
        # Imported here, as importing it configures the root logger.
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        algorithm = DefaultWeightOnlyQuantConfig(block_size=_INT4_BLOCK, is_symmetric=True, accuracy_level=4, bits=4)
        quantizer = MatMulNBitsQuantizer(graph, algo_config=algorithm)
        quantizer.process()
        result: Any = quantizer.model
        round_tables(result.model.graph)
        save_graph(result.model, quantized)


class _One(CalibrationDataReader):
    def __init__(self, batch: Mapping[str, np.ndarray]) -> None:
        self.left: dict[str, np.ndarray] | None = dict(batch)

    def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
        batch, self.left = self.left, None
        return batch


def quantizable(raw: Path, fused: bool = False) -> onnx.ModelProto:
    """The raw graph as quantizers take it: heads untied, and without shapes that contradict their own inference."""
    graph = onnx.load(raw)
    if fused:
        for_decoding(graph)
    untie(graph)
    del graph.graph.value_info[:]
    return graph


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Quantizers advise, on the root logger and on stdout, of what was found to be of no use here."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    root.setLevel(logging.ERROR)
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
        root.setLevel(level)
        root.handlers[:] = handlers


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

"""The named forms of an exported model: which of them model and machine can take, and how each is made of a raw graph.
Making itself is `precision`'s and `quantize`'s; whether a form ships is the gates'.
"""

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.cases import Documents, tokens
from export.io_spec import IoSpec
from export.precision import lower, measure_ranges, overflowing
from export.quantize import quantize, quantize_by_ranges, quantize_weights
from export.runners import open_onnx, usable_threads
from trainer.errors import UserError
from trainer.export_config import Calibration, Export, Precision


def check_variants(name: str, spec: IoSpec, settings: Export) -> None:
    """Raise UserError for a form that this model cannot have, before anything is made; auto leaves those out."""
    for variant in () if settings.variants == "auto" else settings.variants:
        check_variant(name, spec, variant, settings.provider)


def check_variant(name: str, spec: IoSpec, variant: Precision, provider: str) -> None:
    """Raise UserError for a form that this model, or this machine, cannot have."""
    if variant == "int4" and spec.cache is None:
        raise UserError(
            f"there is no int4 of {name}, a {spec.architecture}",
            "a model that generates text: elsewhere int4 is slower than int8 and worse",
            "take int8 or int8_static for it",
        )
    if variant == "bf16":
        check_bf16(provider)


def check_bf16(provider: str) -> None:
    """Raise UserError unless ONNX Runtime runs bf16 there: its CPU provider (1.32) adds no two bf16 numbers."""
    ports = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [1]) for name in ("a", "b", "c")]
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["c"])], "probe", ports[:2], ports[2:])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "bf16.onnx")
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
        open_onnx(path, 1, provider)


def calibration_batches(documents: Documents, spec: IoSpec, settings: Calibration) -> list[dict[str, np.ndarray]]:
    """Batches of real text from the documents' end, the last row of each half padding: gates take the start.

    Their lengths are halved from one to the next down to 1, and begin anew: short inputs have other ranges. A tiny BERT
    that was calibrated on 64 tokens only was off by 57 % on a single token.
    """
    longest = min(settings.sequence_length, spec.max_length)
    halvings = [longest >> step for step in range(longest.bit_length())]
    lengths = [halvings[index % len(halvings)] for index in range(settings.batches)]
    text = tokens(documents[::-1], spec, settings.batch_size * sum(lengths))
    batches = []
    for length in lengths:
        rows = [np.fromiter(islice(text, length), dtype=np.int64) for _ in range(settings.batch_size)]
        batches.append(spec.pad([*rows[:-1], rows[-1][: max(1, length // 2)]], length))
    return batches


def make_variant(
    variant: Precision, raw: Path, file: Path, batches: list[dict[str, np.ndarray]], settings: Calibration
) -> dict[str, Any]:
    """Write one form of graph `raw` to `file` ("fp32" is the raw graph itself); returns what is worth recording."""
    if variant == "int8":
        quantize(raw, file)
    elif variant == "int8_static":
        quantize_by_ranges(raw, file, batches, settings)
        return {"calibration": settings.model_dump()}
    elif variant == "int4":
        quantize_weights(raw, file)
    elif variant == "fp16":
        kept = overflowing(raw, measure_ranges(raw, batches, usable_threads()))
        lower(raw, file, "fp16", kept)
        return {"kept_in_fp32": sorted(kept)}
    elif variant == "bf16":
        lower(raw, file, "bf16", set())  # its range is fp32's
    return {}

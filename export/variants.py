"""The named forms of an exported model: which of them model and machine can take, and how each is made of a raw graph.
Making itself is `precision`'s and `quantize`'s; whether a form ships is the gates'.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.decoding_graph import write_fused
from export.dynamic import quantize
from export.fp8 import FEWEST_OPSET, round_products
from export.io_spec import IoSpec
from export.precision import lower, measure_ranges, overflowing
from export.quantize import quantize_by_ranges, quantize_weights
from export.runners import CPU_PROVIDER, open_onnx, usable_threads
from trainer.errors import UserError
from trainer.export_config import Calibration, Export, Precision

# What `export.variants: auto` tries: ONNX Runtime rounds to fp8 and multiplies in fp32, so that it gains nothing there;
# fp32_fused has fp32's quality and size, and auto does not measure what it is for, steps with a cache.
TRIED: tuple[Precision, ...] = tuple(one for one in get_args(Precision) if one not in ("fp8", "fp32_fused"))


def check_variants(name: str, spec: IoSpec, settings: Export) -> None:
    """Raise UserError for a form that this model cannot have, before anything is made; auto leaves those out."""
    for variant in () if settings.variants == "auto" else settings.variants:
        if variant == "fp8" and settings.opset < FEWEST_OPSET:
            needed = f"{FEWEST_OPSET} or more: QuantizeLinear has no float8 before"
            raise UserError(f"export.variants names fp8, and export.opset is {settings.opset}", needed, "raise it")
        check_variant(name, spec, variant, settings.provider)


def check_variant(name: str, spec: IoSpec, variant: Precision, provider: str) -> None:
    """Raise UserError for a form that this model cannot have."""
    if variant == "int4" and spec.cache is None:
        raise UserError(
            f"there is no int4 of {name}, a {spec.architecture}",
            "a model that generates text: elsewhere int4 is slower than int8 and worse",
            "take int8 or int8_static for it",
        )
    if variant == "fp32_fused" and (spec.cache is None or spec.encoder or provider != CPU_PROVIDER):
        raise UserError(
            f"there is no fp32_fused of {name}, a {spec.architecture}, on {provider}",
            f"a decoder without an encoder, and {CPU_PROVIDER}",
            "take fp32 for it",
        )


def check_tried(name: str, spec: IoSpec, variant: Precision, provider: str) -> None:
    """The same for a form that nobody named: it must run here, too, for its speed to be measured."""
    check_variant(name, spec, variant, provider)
    if variant == "bf16":
        check_bf16(provider)


def check_bf16(provider: str) -> None:
    """Raise UserError unless ONNX Runtime runs bf16 there: its CPU provider (1.30) adds no two bf16 numbers."""
    ports = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [1]) for name in ("a", "b", "c")]
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["c"])], "probe", ports[:2], ports[2:])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "bf16.onnx")
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
        open_onnx(path, 1, provider)


def make_variant(
    variant: Precision,
    raw: Path,
    file: Path,
    batches: Callable[[], list[dict[str, np.ndarray]]],
    settings: Calibration,
    provider: str = CPU_PROVIDER,
) -> dict[str, Any]:
    """Write one form of graph `raw` to `file` ("fp32" is the raw graph itself); returns what is worth recording.

    `batches` gives calibration's, where the form needs them. The forms that only ONNX Runtime takes have the attention
    that its CPU provider has, if `provider` is that one.
    """
    fused = provider == CPU_PROVIDER
    if variant == "fp32_fused":
        write_fused(raw, file)
    elif variant == "int8":
        quantize(raw, file, fused)
    elif variant == "int8_static":
        quantize_by_ranges(raw, file, batches(), settings)
        return {"calibration": settings.model_dump()}
    elif variant == "int4":
        quantize_weights(raw, file, fused)
    elif variant == "fp16":
        kept = overflowing(raw, measure_ranges(raw, batches(), usable_threads()))
        return {"kept_in_fp32": sorted(lower(raw, file, "fp16", kept))}
    elif variant == "bf16":  # its range is fp32's
        return {"kept_in_fp32": sorted(lower(raw, file, "bf16", set()))}
    elif variant == "fp8":
        round_products(raw, file, batches(), usable_threads())
        return {"calibration": settings.model_dump()}
    return {}

"""What each `precision` of a recipe means: what it needs of the device, and which type each part of training has.
How a strategy brings it about is its own affair."""

from importlib import metadata

import torch
from torch import nn

from trainer.errors import UserError


def require(precision: str, device_type: str, strategy: str) -> None:
    """UserError if this machine or strategy cannot train in `precision`; nothing is ever replaced by another."""
    capability = torch.cuda.get_device_capability() if device_type == "cuda" else None
    shown = (
        f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}" if capability else "a CPU"
    )
    needs = {"tf32": (8, 0), "bf16": (8, 0), "fp8": (8, 9), "fp16": (5, 3)}
    if precision in needs and not (precision == "bf16" and capability is None):
        needed = needs[precision]
        if capability is None or capability < needed:
            raise UserError(
                f"precision: {precision} on {shown}",
                f"an NVIDIA GPU of compute capability {needed[0]}.{needed[1]} or higher",
                "choose precision: fp32 or bf16" if capability is None else "choose precision: fp32",
            )
    if precision == "fp16" and strategy == "fsdp2":
        raise UserError(
            "precision: fp16 with engine.strategy: fsdp2",
            "bf16 there (its loss scaling is not shared between shards), or another strategy for fp16",
            "set precision: bf16, or engine.zero: zero3",
        )
    if precision == "fp8":
        _require_fp8(strategy)


def _require_fp8(strategy: str) -> None:
    if strategy != "ddp":
        raise UserError(f"precision: fp8 with engine.strategy: {strategy}", "ddp", "set engine.strategy: ddp, or bf16")
    if not has_fp8():
        raise UserError("precision: fp8, but torchao is not installed", "it", "pip install torchao")


def has_fp8() -> bool:
    """Whether the library that does fp8 is here. Transformer Engine is not taken: as Accelerate 1.15 converts a model
    to it, a head that is tied to the embedding becomes a weight of its own that no optimizer has."""
    try:
        metadata.version("torchao")
    except metadata.PackageNotFoundError:
        return False
    return True


def require_fp8_layers(model: nn.Module) -> None:
    """UserError if no layer of a converted model multiplies in fp8: torchao takes nn.Linear only (GPT-2 has Conv1D),
    but for the first and the last, of sizes that 16 divides."""
    if not any(type(module).__name__ == "Float8Linear" for module in model.modules()):
        raise UserError(
            "precision: fp8, but no layer of this model can multiply in it",
            "nn.Linear of sizes that 16 divides, beside the first and the last",
            "set precision: bf16",
        )


def set_matmul_precision(precision: str) -> None:
    """tf32 only where it is asked for: fp32 means fp32."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def frozen_type(precision: str, converted: bool) -> torch.dtype:
    """The type of the weights of a model that is not trained (`converted`: see `types`): bf16; fp16 only where the one
    in training is, too, as autocast keeps what flows beside the products of fp32 weights in fp32, which fp16's range
    may not hold; fp32 for fp8, of which each product makes its own."""
    if precision == "bf16":
        return torch.bfloat16
    return torch.float16 if precision == "fp16" and converted else torch.float32


def types(precision: str, converted: bool) -> dict[str, str]:
    """The type of each part of training, as launch.json states it; `converted`: DeepSpeed holds the model itself in
    half precision, and does not cast as it goes."""
    compute = {"fp32": "fp32", "tf32": "tf32 (fp32 with 10 bits of mantissa in matrix products)"}.get(
        precision, precision
    )
    low = converted and precision in ("bf16", "fp16")
    return {
        "matrix_products": compute,
        "master_weights": "fp32",
        "optimizer_state": "fp32",
        "parameters": precision if low else "fp32",
        "gradients": precision if low else "fp32",
    }

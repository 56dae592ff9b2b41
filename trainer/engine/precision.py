"""What each `precision` of a recipe means: what it needs of the device, and which type each part of training has.
How a strategy brings it about is its own affair."""

from importlib import metadata

import torch

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
    if fp8_backend() is None:
        raise UserError(
            "precision: fp8, but neither torchao nor transformer_engine is installed",
            "one of them",
            "pip install torchao",
        )


def fp8_backend() -> str | None:
    """The library that does fp8 here, by Accelerate's name: TE, AO, or None."""
    for package, name in (("transformer_engine", "TE"), ("torchao", "AO")):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        return name
    return None


def set_matmul_precision(precision: str) -> None:
    """tf32 only where it is asked for: fp32 means fp32."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def compute_dtype(precision: str) -> torch.dtype:
    """The type of a tensor that products are computed in; float32 for fp8, of which each product makes its own."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


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

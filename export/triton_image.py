"""Which container image of Triton serves a packed model.
It knows releases and versions only; what stands in the Dockerfile is `pack`'s."""

from trainer.errors import UserError

# The newest release that docs/introduction/compatibility.md of triton-inference-server/server lists in September 2026;
# its ONNX Runtime is 1.28.0, which opens every opset that `export.opset` may name.
RELEASE = "26.08"
# TensorRT to the release that carries it: NVIDIA's frameworks support matrix, as remembered and not looked up again;
# the Dockerfile that is packed ends its build if an image has another one.
_TENSORRT_RELEASES = {
    "10.0.1": "24.05",
    "10.1.0": "24.06",
    "10.2.0": "24.07",
    "10.3.0": "24.08",
    "10.4.0": "24.09",
    "10.5.0": "24.10",
    "10.6.0": "24.11",
    "10.7.0": "24.12",
    "10.8.0": "25.02",
    "10.9.0": "25.04",
    "10.10.0": "25.05",
    "10.11.0": "25.06",
    "10.13.2": "25.08",
    "10.13.3": "25.10",
    "10.14.1": "25.12",
}


def triton_image(tensorrt: str | None = None) -> str:
    """Image for an ONNX graph, or for an engine of this TensorRT version; UserError where none is known."""
    release = RELEASE
    if tensorrt is not None:
        found = _TENSORRT_RELEASES.get(".".join(tensorrt.split(".")[:3]))
        if found is None:
            raise UserError(
                f"no Triton image is known to have TensorRT {tensorrt}",
                f"an engine of {', '.join(_TENSORRT_RELEASES)}, or the name of an image",
                "set pack.image to one with this TensorRT",
            )
        release = found
    return f"nvcr.io/nvidia/tritonserver:{release}-py3"

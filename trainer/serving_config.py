"""The schema of a recipe's last part: what a server is given, and how it batches.
What is exported and how far it may differ is in `export_config`; nothing here does I/O or imports torch."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from trainer.export_config import ModelName, Precision
from trainer.sections import Fraction, NonNegative, Section

NonNegativeInt = Annotated[int, Field(ge=0)]


class Profile(Section):
    """Shapes that an engine takes: smallest, best tuned, largest. Lengths above the model's maximum become it."""

    batch_size: tuple[PositiveInt, PositiveInt, PositiveInt]
    sequence_length: tuple[PositiveInt, PositiveInt, PositiveInt]
    past_length: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] = (0, 128, 1024)
    """Of a decoder's cache; no other model has one. Of an encoder-decoder `sequence_length` is its text's."""

    @model_validator(mode="after")
    def _rising(self) -> "Profile":
        for name in type(self).model_fields:
            low, best, high = getattr(self, name)
            if not low <= best <= high:
                raise ValueError(f"{name} ({low}, {best}, {high}) must rise: smallest, best tuned, largest")
        return self


class TensorRT(Section):
    """Engines from verified ONNX files, precision as the file says."""

    library: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    """tensorrt (10 or 11) builds for the GPU that is here; tensorrt_rtx (1.7) for any, also without one. auto takes
    tensorrt where it and a GPU are, else tensorrt_rtx, and says so."""
    models: tuple[ModelName, ...] = ()
    """Names of exported models; by default all."""
    variants: tuple[Precision, ...] = ()
    """Variants of `export.variants`; by default all whose operators the library knows, the others are named."""
    compute_capabilities: tuple[Annotated[str, Field(pattern=r"^\d+\.\d+$")], ...] = ()
    """One engine for each, such as 8.9; by default 8.0, 8.9 and 12.0 (tensorrt_rtx), or the GPU's own (tensorrt)."""
    profiles: Annotated[tuple[Profile, ...], Field(min_length=1)] = (
        Profile(batch_size=(1, 1, 1), sequence_length=(1, 128, 512), past_length=(0, 128, 1024)),
        Profile(batch_size=(1, 16, 32), sequence_length=(1, 128, 512), past_length=(0, 128, 1024)),
    )
    """Later ones are for larger batches or longer rows; a call takes the first that its shapes fit."""
    max_wider_share: Fraction = 0.0
    """Share of an engine's matrix layers that may run in another precision than its variant's name says."""
    tf32: bool = False
    """Multiply fp32 matrices with TF32's 10-bit mantissas."""
    version_compatible: bool = False
    """tensorrt: engines that later versions of the library load too; slower."""
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    """tensorrt: GPUs other than the one that built it that may run an engine; slower."""


class Pack(Section):
    """Verified exports to a Triton model repository, and to the folder layout that transformers.js and
    text-embeddings-inference read."""

    models: tuple[ModelName, ...] = ()
    """Names of exported models; by default all."""
    variant: Precision | Literal["auto"] = "auto"
    """What Triton serves: a variant of `export.variants`; auto takes the smallest verified file that the
    device runs, never fp8's, and says so."""
    backend: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    """Triton's backend for the network. tensorrt needs engines of the `tensorrt` section."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where the network runs. Tokenizer and answer are on the CPU always."""
    instances: PositiveInt = 1
    """Copies of the network that run at the same time, on each GPU if `device` is gpu."""
    max_batch_size: PositiveInt = 32
    """Texts in one call of the network."""
    max_queue_delay_ms: NonNegative = 2.0
    """How long a text waits for others to share its call."""
    pad_to_multiple_of: PositiveInt = 32
    """Texts are padded to a multiple of so many tokens: Triton merges only requests of one shape."""
    top_k: PositiveInt = 5
    """Answers with so many candidates, as far as there are."""
    max_new_tokens: PositiveInt = 64
    """Of the text that an encoder-decoder answers with; one that has not ended by then is cut."""
    image: Annotated[str, Field(min_length=1)] | None = None
    """Container image of Triton; by default a newest one, for engines one with the TensorRT that built them."""

    @model_validator(mode="after")
    def _tensorrt_is_on_a_gpu(self) -> "Pack":
        if self.backend == "tensorrt" and self.device != "gpu":
            raise ValueError("backend tensorrt runs on a GPU: set device: gpu")
        if self.variant == "fp8" and self.backend != "tensorrt":
            raise ValueError("variant fp8 is for engines alone: set backend: tensorrt")
        if self.variant == "bf16" and self.device != "gpu":
            raise ValueError("variant bf16 runs on a GPU: set device: gpu")
        return self

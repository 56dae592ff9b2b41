"""The schema of a recipe's last part: what a server is given, and how it batches.
What is exported and how far it may differ is in `export_config`; nothing here does I/O or imports torch."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from trainer.export_config import ModelName, Precision
from trainer.sections import NonNegative, Section


class Pack(Section):
    """Verified exports to a Triton model repository, and to the folder layout that transformers.js and
    text-embeddings-inference read."""

    models: tuple[ModelName, ...] = ()
    """Names of exported models; by default all."""
    variant: Precision | Literal["auto"] = "auto"
    """What Triton serves: a variant of `export.variants`; auto takes the smallest verified file and says so."""
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
    image: Annotated[str, Field(min_length=1)] | None = None
    """Container image of Triton; by default a newest one, for engines one with the TensorRT that built them."""

    @model_validator(mode="after")
    def _tensorrt_is_on_a_gpu(self) -> "Pack":
        if self.backend == "tensorrt" and self.device != "gpu":
            raise ValueError("backend tensorrt runs on a GPU: set device: gpu")
        return self

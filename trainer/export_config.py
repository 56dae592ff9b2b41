"""The schema of a recipe's later half: what is exported, how far it may differ, and how it is measured.
The stages that make a model are in `config`; nothing here does I/O or imports torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from trainer.sections import Fraction, NonNegative, Positive, Section, Share

MaxAbs = Annotated[
    Positive | None, Field(description="Largest absolute difference of an output on real tokens; null: no limit.")
]
RelativeRms = Annotated[
    Positive | None,
    Field(description="Root mean square of the difference, relative to that of the source's output; null: no limit."),
]
MinTop1 = Annotated[Fraction, Field(description="Share of real tokens whose highest logit is the same.")]


class Tolerance(Section):
    """What an exported model may differ from its source, on tokens that are not padding."""

    max_abs: MaxAbs = None
    relative_rms: RelativeRms = None
    min_top1: MinTop1 = 0.0

    @model_validator(mode="after")
    def _holds_something_out(self) -> "Tolerance":
        if self.max_abs is None and self.relative_rms is None and self.min_top1 == 0.0:
            raise ValueError("a gate without any limit passes everything; keep max_abs, relative_rms or min_top1")
        return self


class Fp32Tolerance(Tolerance):
    max_abs: MaxAbs = 1e-3
    relative_rms: RelativeRms = 1e-5
    min_top1: MinTop1 = 0.999


class Int8Tolerance(Tolerance):
    relative_rms: RelativeRms = 0.1
    min_top1: MinTop1 = 0.90


class Fp16Tolerance(Tolerance):
    relative_rms: RelativeRms = 0.01
    min_top1: MinTop1 = 0.98


class Bf16Tolerance(Tolerance):
    relative_rms: RelativeRms = 0.05
    min_top1: MinTop1 = 0.95


class Int4Tolerance(Tolerance):
    relative_rms: RelativeRms = 0.2
    min_top1: MinTop1 = 0.85


class Fp8Tolerance(Tolerance):
    relative_rms: RelativeRms = 0.15
    min_top1: MinTop1 = 0.90


class Parity(Section):
    """Shapes and thresholds of the gate. Lengths 1 and the model's maximum are always tried."""

    fp32: Fp32Tolerance = Fp32Tolerance()
    fp32_fused: Fp32Tolerance = Fp32Tolerance()
    fp16: Fp16Tolerance = Fp16Tolerance()
    bf16: Bf16Tolerance = Bf16Tolerance()
    int8: Int8Tolerance = Int8Tolerance()
    int8_static: Int8Tolerance = Int8Tolerance()
    int4: Int4Tolerance = Int4Tolerance()
    fp8: Fp8Tolerance = Fp8Tolerance()
    shapes: tuple[tuple[PositiveInt, PositiveInt], ...] = ((1, 7), (3, 33), (4, 64), (8, 16))
    """(batch, sequence) pairs beside the edge cases."""
    max_length: PositiveInt = 1024
    """The edge case of a model that takes longer inputs; costs memory of its square."""


class Quality(Section):
    """The gate on what a model is for: perplexity, or the accuracy on masked tokens, of validation text; accuracy or F1
    on labelled text. A head for classes, tokens or answers without labelled text is held by `parity` alone."""

    share: Share = 0.99
    """What a form must keep of its source's quality: its accuracy over the source's, or the source's perplexity over
    its own. Fails if less is kept, or if the 95 % bootstrap interval is too wide to tell."""
    sequences: PositiveInt = 256
    """Rows of text, each a piece of one document, or of `labelled`. An encoder-decoder encodes a row's first half, and
    its perplexity is that of the second."""
    sequence_length: PositiveInt = 128
    labelled: Path | None = None
    """A jsonl file for models with such a head, up to `sequences` rows evenly over it: {text, label} for accuracy;
    {tokens, labels}, a label for each word, for F1 of entities; {question, context, answers} for F1 of words."""


class Calibration(Section):
    """Real text on which ranges of values are measured, for `fp16`, `int8_static` and `fp8`: training text, or what no
    gate takes."""

    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    """How `int8_static` chooses its ranges: all that was seen, least Kullback-Leibler divergence, or `percentile`."""
    percentile: Annotated[float, Field(gt=50.0, le=100.0)] = 99.99
    symmetric: bool = False
    """`int8_static` with signed activations and no zero points, which is all that TensorRT takes."""
    batches: PositiveInt = 16
    batch_size: Annotated[int, Field(ge=2)] = 2
    """The last row of each batch is padded, as masks show their values only there."""
    sequence_length: PositiveInt = 64
    """The longest; others are halves of it, down to 1."""


Precision = Literal["fp32", "fp32_fused", "fp16", "bf16", "int8", "int8_static", "int4", "fp8"]
Backend = Literal[
    "eager", "compile", "onnx_fp32", "onnx_fp32_fused", "onnx_fp16", "onnx_bf16", "onnx_int8", "onnx_int8_static",
    "onnx_int4",
    "tensorrt_fp32", "tensorrt_fp16", "tensorrt_bf16", "tensorrt_int8_static", "tensorrt_fp8",
]  # fmt: skip
# Engines of the `tensorrt` stage, by either library, to the variant whose graph they stand for.
ENGINES: dict[str, Precision] = {
    "tensorrt_fp32": "fp32",
    "tensorrt_fp16": "fp16",
    "tensorrt_bf16": "bf16",
    "tensorrt_int8_static": "int8_static",
    "tensorrt_fp8": "fp8",
}
# Names that transformers.js looks for (its DEFAULT_DTYPE_SUFFIX_MAPPING), as far as it knows the precision.
ONNX_FILES: dict[str, str] = {
    "onnx_fp32": "model.onnx",
    "onnx_fp32_fused": "model_fused.onnx",
    "onnx_fp16": "model_fp16.onnx",
    "onnx_bf16": "model_bf16.onnx",
    "onnx_int8": "model_quantized.onnx",
    "onnx_int8_static": "model_int8_static.onnx",
    "onnx_int4": "model_q4.onnx",
    "onnx_fp8": "model_fp8.onnx",
}
Lengths = Literal["full", "real"]
# A folder of this name is replaced as a whole, so it must be one below `export` and no hidden or half-written one.
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*(\.[0-9][A-Za-z0-9_-]*)*$")]


# Told apart before they are checked, so that a mistake is reported for the one that was meant.
Variants = Annotated[
    Annotated[tuple[Precision, ...], Field(min_length=1), Tag("list")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(lambda value: "auto" if isinstance(value, str) else "list"),
]


class Export(Section):
    """Model folders to verified ONNX."""

    models: dict[ModelName, Path | None] = {}
    """Name to model folder; each is exported to `<run_dir>/export/<name>`. By default `teacher` (pretrain's) and
    `student` (distill's), as far as they exist."""
    variants: Variants = ("fp32", "int8")
    """What is shipped; `fp32` is held first in any case. `fp32_fused` is `fp32` in ONNX Runtime's own nodes, for
    decoding on the CPU, in a file of its own, as `fp32` is what engines are built of. `int8` quantizes activations as
    they come, `int8_static` by ranges from `calibration`; `int4` is weights only, for models that generate text. `bf16`
    and `fp8` are for GPUs and engines: on the CPU the gates run products in fp32, rounded alike. auto tries all
    but `fp8` and `fp32_fused` that this machine can run, and keeps those that pass the gates and are not beaten by
    another in quality, latency and size at once, beyond their noise."""
    provider: Literal["CPUExecutionProvider", "CUDAExecutionProvider"] = "CPUExecutionProvider"
    """ONNX Runtime's, on which the gates run."""
    calibration: Calibration = Calibration()
    opset: Annotated[int, Field(ge=18, le=23)] = 20
    parity: Parity = Parity()
    quality: Quality | None = Quality()
    """Null: tensors alone are compared, as for weights that were never trained."""


class Decode(Section):
    """Text token by token, from models that keep a cache; not in `compile`, which compiles anew as the cache grows."""

    prompt_lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """By default those of the benchmark's `sequence_lengths` that leave the model room for `new_tokens`."""
    new_tokens: Annotated[int, Field(ge=2)] = 16


class Load(Section):
    """Requests that arrive at random (Poisson) whether or not earlier ones were answered, each a real document, for a
    server process with a queue. A model that generates answers with `new_tokens`."""

    p99_limit_ms: Positive
    """What 99 of 100 requests may wait at most, from when they were due to their answer."""
    rates: Annotated[tuple[Positive, ...], Field(min_length=1)] | Literal["auto"] = "auto"
    """Requests a second; auto: a search for the highest rate that holds the limit."""
    seconds: Positive = 5.0
    """Of each rate; longer where it takes that to send the 100 requests that a 99th percentile needs."""
    max_batch: PositiveInt = 8
    """Requests that wait are answered together, up to so many, padded to the longest of them; 1: one by one."""
    max_wait_ms: NonNegative = 0.0
    """How long the first request of a batch waits for others."""
    backends: Annotated[tuple[Backend, ...], Field(min_length=1)] | None = None
    """Some of the benchmark's; by default all."""
    new_tokens: PositiveInt = 16


class Bench(Section):
    """Speed, memory, size and quality of each model in each backend."""

    backends: Annotated[tuple[Backend, ...], Field(min_length=1)] = ("eager", "compile", "onnx_fp32", "onnx_int8")
    batch_sizes: tuple[PositiveInt, ...] = (1, 8)
    sequence_lengths: tuple[PositiveInt, ...] = (32, 128)
    lengths: Annotated[tuple[Lengths, ...], Field(min_length=1)] = ("full",)
    """Rows of a batch: `full` of real tokens, or `real`: documents cut at the length, padded to the longest of them."""
    provider: Literal["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"] = (
        "CPUExecutionProvider"
    )
    """ONNX Runtime's; with another than the CPU's, PyTorch's rows run on the GPU too, as engines always do. Rows of a
    graph of which a node ran elsewhere, other than those that reckon with shapes, are refused."""
    cuda_graphs: bool = False
    """Record the call of each shape on the GPU once and replay it: engines and torch.compile. Generating and load are
    measured without."""
    threads: PositiveInt | None = None
    """CPU threads for every backend; by default the number of physical cores."""
    window_s: Positive = 0.3
    """Length of one measuring window, and of the warm-up before the first; at least three calls."""
    max_windows: Annotated[int, Field(ge=3)] = 10
    """A row whose last three windows never agree within `stability` after so many is marked unstable, and so is one
    for which others had the CPU in so many."""
    stability: Share = 0.1
    """Largest minus smallest median of the three, relative to the middle one."""
    quality_sequences: PositiveInt = 256
    """Validation rows (pieces of one document) on which quality is measured, at the longest `sequence_lengths`."""
    decode: Decode | None = Decode()
    """Null: none."""
    load: Load | None = None
    """Null: none; takes about 40 s for each model and backend."""

    @model_validator(mode="after")
    def _loads_what_is_measured(self) -> "Bench":
        others = set(self.load.backends or ()) - set(self.backends) if self.load else set()
        if others:
            raise ValueError(f"load.backends has {', '.join(sorted(others))}, which backends has not")
        return self

    @model_validator(mode="after")
    def _cuda_graphs_are_a_gpus(self) -> "Bench":
        if self.cuda_graphs and self.provider == "CPUExecutionProvider":
            raise ValueError("cuda_graphs are a GPU's: set provider to one, or leave it out")
        return self

    @model_validator(mode="after")
    def _engines_are_on_a_gpu(self) -> "Bench":
        if set(self.backends) & set(ENGINES) and self.provider == "CPUExecutionProvider":
            raise ValueError("engines run on a GPU, and are compared with what does: set provider to a GPU's")
        return self

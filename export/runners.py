"""One face over PyTorch, torch.compile, ONNX Runtime and engines: `run(inputs) -> outputs`, numpy arrays by name.
What the inputs hold, and what is made of the outputs, is the caller's business.

torch is imported only by the backends that need it, so that an ONNX process holds ONNX Runtime's memory alone.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil

from export.io_spec import PAIR_STEMS, ROOM_IN_PAST, IoSpec, Port, graph_files, read_spec
from trainer.errors import UserError
from trainer.export_config import ENGINES, ONNX_FILES, Backend

Arrays = dict[str, np.ndarray]
CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
TENSORRT_PROVIDER = "TensorrtExecutionProvider"
# By default it multiplies fp32 in TF32, which has the mantissa of fp16.
_CUDA = (CUDA_PROVIDER, {"use_tf32": "0"})
# What a session is opened with for the provider that is asked for: TensorRT leaves what it does not take to CUDA. Of
# TensorRT's provider nothing but its environment (NVIDIA_TF32_OVERRIDE) sets TF32.
_OPENED = {CUDA_PROVIDER: [_CUDA], TENSORRT_PROVIDER: [TENSORRT_PROVIDER, _CUDA]}


class Runner(Protocol):
    """A loaded model in some backend."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays: ...


@dataclass(frozen=True)
class OnnxRunner:
    """A graph in ONNX Runtime, with the signature that its file declares."""

    session: Any
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    room_in_past: bool = False
    """Its attention is `decoding_graph`'s."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """All outputs for `inputs`; raises ONNX Runtime's error where the graph cannot take them."""
        if not self.room_in_past:
            return self._run(inputs)
        (batch, new), total = inputs["input_ids"].shape, inputs["attention_mask"].shape[1]
        if batch == 1 or new in (1, total):
            return self._run(inputs)
        # Several tokens after a past are what fused attention takes for one text only.
        rows = [self._run({name: value[row : row + 1] for name, value in inputs.items()}) for row in range(batch)]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        values = self.session.run(None, dict(inputs))
        return dict(zip((port.name for port in self.outputs), values, strict=True))


@dataclass(frozen=True)
class TorchRunner:
    """A model folder in PyTorch, as it is or compiled. `run` copies arrays to its device and back in each call."""

    call: Callable[..., Any]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    device: str = "cpu"

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """All outputs for `inputs`."""
        return {name: value.cpu().numpy() for name, value in self.run_tensors(self.tensors(inputs)).items()}

    def tensors(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The arrays on the model's device."""
        import torch

        return {name: torch.from_numpy(value).to(self.device) for name, value in arrays.items()}

    def run_tensors(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The same on tensors that lie on the model's device, where all outputs stay."""
        import torch

        with torch.inference_mode():
            values = self.call(*(inputs[name] for name in self.input_names))
        return dict(zip(self.output_names, values, strict=True))


@dataclass(frozen=True)
class Pair:
    """The two graphs of an encoder-decoder, each with a face of its own; together they are a runner, too."""

    encoder: Runner
    decoder: Runner
    spec: IoSpec
    one_by_one: bool = False
    """The decoder takes one token a call, as engines do."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """The decoder's outputs for the encoder's inputs and `decoder_input_ids`, int64 [B, T]: as `feeds` says."""
        feeds = self.feeds(inputs)
        if not self.one_by_one:
            return self.decoder.run(feeds)
        assert self.spec.cache is not None
        logits, outputs = [], {}
        for at in range(feeds["input_ids"].shape[1]):
            outputs = self.decoder.run(feeds | {"input_ids": feeds["input_ids"][:, at : at + 1]})
            feeds |= self.spec.cache.next_past(outputs)
            logits.append(outputs["logits"])
        return outputs | {"logits": np.concatenate(logits, axis=1)}

    def feeds(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """The decoder's inputs once the encoder has run; without `decoder_input_ids` those of the first step, a start
        token for each text."""
        assert self.spec.encoder is not None and self.spec.cross is not None
        encoded = self.spec.cross.next_past(
            self.encoder.run({port.name: inputs[port.name] for port in self.spec.encoder.inputs})
        )
        mask_BS = inputs["attention_mask"]
        start_B1 = np.full((len(mask_BS), 1), self.spec.start_id, dtype=np.int64)
        return self.spec.feeds(inputs.get("decoder_input_ids", start_B1), mask_BS, encoded)


def open_runner(
    folder: Path, backend: Backend, threads: int, provider: str = CPU_PROVIDER, spec: IoSpec | None = None,
    cuda_graphs: bool = False,
) -> "Runner | Pair":  # fmt: skip
    """A runner for `folder` (a model folder for eager and compile, an export folder for the others), in PyTorch on the
    kind of device that ONNX Runtime's `provider` stands for; for the `spec` of an encoder-decoder a `Pair`.

    `cuda_graphs`: engines and compiled models record a shape's call on the GPU once, and replay it.

    Raises UserError where the folder lacks the backend's file, or the backend is not installed as asked.
    """
    if backend in ENGINES:
        from export.rebuild import open_fitting

        return open_fitting(folder, ENGINES[backend], cuda_graphs)
    pair = spec if spec and spec.encoder else None
    if backend in ONNX_FILES and pair:
        files = [folder / file for file in graph_files(PAIR_STEMS, backend)]
        return open_onnx_graphs(files, pair, threads, provider)
    if backend in ONNX_FILES:
        return open_onnx(folder / ONNX_FILES[backend], threads, provider)
    open_it, device = open_torch_pair if pair else open_torch, "cpu" if provider == CPU_PROVIDER else "cuda"
    return open_it(folder, threads, backend == "compile", device, cuda_graphs)


def open_onnx_graphs(
    files: Sequence[Path], spec: IoSpec, threads: int, provider: str = CPU_PROVIDER
) -> "Runner | Pair":
    """The graph of a model, or both of an encoder-decoder, in the order of `IoSpec.parts`."""
    return together([open_onnx(file, threads, provider) for file in files], spec)


def together(graphs: "Sequence[Runner]", spec: IoSpec, one_by_one: bool = False) -> "Runner | Pair":
    """The runner of a model's graphs: of one that one itself, of two a `Pair`."""
    if spec.encoder is None:
        return graphs[0]
    encoder, decoder = graphs
    return Pair(encoder, decoder, spec, one_by_one)


def open_onnx(path: Path, threads: int, provider: str = CPU_PROVIDER, profile: Path | None = None) -> OnnxRunner:
    """A graph file in ONNX Runtime, on exactly the provider that was asked for.

    `profile`: the beginning of a file's name, under which the session's `end_profiling` writes where nodes ran.
    """
    import onnxruntime

    if not path.is_file():
        raise UserError(f"{path} is not there", "an exported model", "run `lmworks export` first")
    require_provider(provider)
    if provider != CPU_PROVIDER:
        onnxruntime.preload_dlls()  # CUDA's and cuDNN's wheels, which nothing else loads where torch is not imported
    options = onnxruntime.SessionOptions()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    unfit = None
    if path.stem.endswith("_fp8"):
        # ONNX Runtime (1.30) takes fp8 for int8: it refuses what it then makes of a product between quantized numbers,
        # and leaves out a Relu or Clip before rounding, as if zero were the least number that there is.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        unfit = ["ReluQuantRewrite", "ClipQuantRewrite"]
    try:
        session = onnxruntime.InferenceSession(
            path, options, providers=_OPENED.get(provider, [provider]), disabled_optimizers=unfit
        )
    except Exception as error:  # its errors have no class in common
        raise UserError(
            f"{path.name} does not open on {provider}: {str(error).splitlines()[0][:300]}",
            "a graph whose operators this provider has",
            "leave that precision out here, or take another provider",
        ) from error
    if session.get_providers()[0] != provider:  # ONNX Runtime goes on with the CPU when another provider fails
        raise UserError(f"ONNX Runtime took {session.get_providers()[0]}", provider, "install the matching onnxruntime")
    room = ROOM_IN_PAST in session.get_modelmeta().custom_metadata_map
    return OnnxRunner(session, _ports(session.get_inputs()), _ports(session.get_outputs()), room)


def require_provider(provider: str) -> None:
    """UserError where the installed ONNX Runtime was built without `provider`: it would go on with the CPU."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise UserError(f"this ONNX Runtime has {', '.join(available)}", provider, "install the matching onnxruntime")


def open_torch(
    folder: Path, threads: int, compiled: bool = False, device: str = "cpu", cuda_graphs: bool = False
) -> TorchRunner:
    """A model folder in PyTorch; compiled: by inductor, once for all shapes, with CUDA graphs recorded for each. Sets
    torch's thread count.

    Of an encoder-decoder it is the decoder, as `read_spec` gives its face. Raises UserError for a GPU where PyTorch
    finds none.
    """
    import torch

    from export.to_onnx import load_model

    if device != "cpu" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU here", device, "install the torch that fits your driver")
    torch.set_num_threads(threads)
    spec = read_spec(folder)
    return torch_runner(load_model(folder, spec), spec, compiled, device, cuda_graphs)


def open_torch_pair(
    folder: Path, threads: int, compiled: bool = False, device: str = "cpu", cuda_graphs: bool = False
) -> Pair:
    """An encoder-decoder's folder in PyTorch, its weights loaded once; otherwise as `open_torch`."""
    spec, decoder = read_spec(folder), open_torch(folder, threads, compiled, device, cuda_graphs)
    assert spec.encoder is not None
    model = decoder.call.model  # type: ignore[attr-defined] - of a Traceable, which a compiled one hands on
    return Pair(torch_runner(model, spec.encoder, compiled, device, cuda_graphs), decoder, spec)


def torch_runner(
    model: Any, spec: IoSpec, compiled: bool = False, device: str = "cpu", cuda_graphs: bool = False
) -> TorchRunner:
    """A loaded model with the face of `spec`."""
    import torch

    from export.to_onnx import Traceable

    traceable: Any = Traceable(model, spec).eval().to(device)
    mode = "reduce-overhead" if cuda_graphs and device != "cpu" else "default"  # torch's name for CUDA graphs
    call = torch.compile(traceable, dynamic=True, mode=mode) if compiled else traceable
    inputs, outputs = (tuple(port.name for port in ports) for ports in (spec.inputs, spec.outputs))
    return TorchRunner(call, inputs, outputs, device)


def process_environment(threads: int) -> dict[str, str]:
    """The environment of a process that runs a backend on so many threads."""
    own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | own


def usable_threads() -> int:
    """Physical cores that this process may use: a second thread on one core only gets in the first one's way."""
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(logical, psutil.cpu_count(logical=False) or logical))


def _ports(declared: Any) -> tuple[Port, ...]:
    numpy_names = {"float": "float32", "double": "float64"}
    found = []
    for value in declared:
        inner = re.fullmatch(r"tensor\((\w+)\)", value.type)
        name = inner.group(1) if inner else value.type
        found.append(Port(value.name, numpy_names.get(name, name), tuple(value.shape)))
    return tuple(found)

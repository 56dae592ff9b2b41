"""A TensorRT or TensorRT-RTX engine behind the Runner's face: profiles, streams, CUDA graphs; memory is torch's.
Whether an engine may be loaded is `engine_files`' business, which is asked first.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.engine_files import check_place, read_manifest
from export.io_spec import IoSpec, Port
from export.profiles import Profile, require_profile
from export.runners import Arrays
from export.tensorrt_library import load_library, this_place
from trainer.errors import UserError

_NUMPY_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}


@dataclass
class _Bound:
    """An execution context with the buffers that it reads and writes, and a recording of its call."""

    context: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    graph: Any = None


@dataclass
class TensorRTRunner:
    """A loaded engine. `cuda_graphs`: each set of shapes is recorded at its first call and replayed from then on."""

    engine: Any
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    profiles: tuple[Profile, ...]
    cuda_graphs: bool = False
    device: str = "cuda"
    """torch's name of where buffers lie."""
    _own_stream: Any = None
    _contexts: dict[int, Any] = field(default_factory=dict)  # by profile
    _recorded: dict[tuple[Any, ...], _Bound] = field(default_factory=dict)  # by shapes

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """All outputs for `inputs`; UserError for shapes that no profile of the engine takes."""
        profile = require_profile(self.profiles, {port.name: inputs[port.name].shape for port in self.inputs})
        with self.stream():
            if self.cuda_graphs:
                bound = self._replay(profile, inputs)
            else:
                bound = self._bind(self.context(profile), inputs)
                self.enqueue(bound.context)
            self.wait()
            return {name: buffer.float().cpu().numpy() if buffer.is_floating_point() else buffer.cpu().numpy()
                    for name, buffer in bound.outputs.items()}  # fmt: skip

    def stream(self) -> contextlib.AbstractContextManager[object]:
        """The stream of all that this engine does, made once: TensorRT waits more often on CUDA's default one."""
        import torch

        if self.device == "cpu":
            return contextlib.nullcontext()
        if self._own_stream is None:
            self._own_stream = torch.cuda.Stream()
        return torch.cuda.stream(self._own_stream)

    def context(self, profile: int) -> Any:
        """The execution context of a profile, made once."""
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        return self._contexts[profile]

    def enqueue(self, context: Any) -> None:
        """Begin a call whose shapes and addresses are set, on the current stream."""
        if not context.execute_async_v3(self._current()):
            raise RuntimeError("the engine did not run")

    def wait(self) -> None:
        """Until all calls on the current stream are done."""
        import torch

        if self.device != "cpu":
            torch.cuda.current_stream().synchronize()

    def _current(self) -> int:
        import torch

        return torch.cuda.current_stream().cuda_stream if self.device != "cpu" else 0

    def _replay(self, profile: int, inputs: Mapping[str, np.ndarray]) -> _Bound:
        """A recording holds addresses and shapes, so that each has a context of its own."""
        import torch

        key = tuple(inputs[port.name].shape for port in self.inputs)
        if key not in self._recorded:
            bound = self._bind(self._new_context(profile), inputs)
            bound.graph = self._record(bound.context)
            self._recorded[key] = bound
        bound = self._recorded[key]
        for name, buffer in bound.inputs.items():
            buffer.copy_(torch.from_numpy(inputs[name]))
        bound.graph.replay()
        return bound

    def _new_context(self, profile: int) -> Any:
        context = self.engine.create_execution_context()
        context.set_optimization_profile_async(profile, self._current())
        return context

    def _bind(self, context: Any, inputs: Mapping[str, np.ndarray]) -> _Bound:
        """Give a context its inputs, on the GPU, and room for its outputs."""
        import torch

        whole = {port.name: np.ascontiguousarray(inputs[port.name]) for port in self.inputs}  # only an address is given
        given = {name: torch.from_numpy(value).to(self.device) for name, value in whole.items()}
        for name, buffer in given.items():
            context.set_input_shape(name, tuple(buffer.shape))
        missing = context.infer_shapes()
        assert not missing, missing
        made = {}
        for port in self.outputs:
            shape = tuple(context.get_tensor_shape(port.name))
            made[port.name] = torch.empty(shape, dtype=getattr(torch, port.dtype), device=self.device)
        somewhere = torch.empty(1, device=self.device)  # an empty past has no address, and null is none
        for name, buffer in (given | made).items():
            context.set_tensor_address(name, buffer.data_ptr() or somewhere.data_ptr())
        return _Bound(context, given, made)

    def _record(self, context: Any) -> Any:
        """A first call compiles and allocates, which a recording may not; the second is recorded."""
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.enqueue(context)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # TensorRT-RTX compiles in threads of its own
            self.enqueue(context)
        return graph


def open_engine(plan: Path, spec: IoSpec, onnx: Path | None = None, cuda_graphs: bool = False) -> TensorRTRunner:
    """A runner for a plan file, loaded only after its manifest says that it runs here.

    UserError with every reason why it does not: bytes, library, version, GPU, driver, or another graph than `onnx`.
    """
    manifest = read_manifest(plan)
    library = load_library(manifest["library"])
    here = this_place(manifest["library"], library)
    check_place(plan, manifest, here, onnx)
    engine = library.Runtime(library.Logger(library.Logger.Severity.ERROR)).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise UserError(f"{plan} cannot be loaded, though its manifest fits this place", "an engine that loads")
    ports = [_port(library, engine, engine.get_tensor_name(index), spec) for index in range(engine.num_io_tensors)]
    is_input = {port.name: engine.get_tensor_mode(port.name) == library.TensorIOMode.INPUT for port in ports}
    inputs = tuple(port for port in ports if is_input[port.name])
    outputs = tuple(port for port in ports if not is_input[port.name])
    profiles = tuple(
        {port.name: tuple(map(tuple, engine.get_tensor_profile_shape(port.name, index))) for port in inputs}
        for index in range(engine.num_optimization_profiles)
    )
    return TensorRTRunner(engine, inputs, outputs, profiles, cuda_graphs)


def _port(library: Any, engine: Any, name: str, spec: IoSpec) -> Port:
    """An engine's tensor with the axes' names, which only the spec has, where it is what the spec declares."""
    dtype = _NUMPY_NAMES[engine.get_tensor_dtype(name).name]
    dims = tuple(engine.get_tensor_shape(name))
    for port in (*spec.inputs, *spec.outputs):
        fixed = [isinstance(axis, int) and axis != dim for axis, dim in zip(port.axes, dims, strict=False)]
        if (port.name, port.dtype, len(port.axes)) == (name, dtype, len(dims)) and not any(fixed):
            return port
    return Port(name, dtype, dims)

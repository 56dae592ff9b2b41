"""An engine's face over ONNX Runtime on the CPU: it reads and writes the bare addresses that it is given, as TensorRT
does on a GPU, so that a runner's binding of buffers is run for real where no GPU is."""

import ctypes
from math import prod
from pathlib import Path

import numpy as np

from export.io_spec import BATCH, PAST, SEQUENCE, IoSpec
from export.profiles import shape_of
from export.runners import open_onnx
from export.tensorrt_runner import TensorRTRunner


class Context:
    def __init__(self, engine):
        self.engine, self.profile, self.shapes, self.addresses = engine, None, {}, {}

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile

    def set_input_shape(self, name, shape):
        low, _, high = self.engine.profiles[self.profile][name]
        assert all(least <= axis <= most for least, axis, most in zip(low, shape, high, strict=True)), (name, shape)
        self.shapes[name] = tuple(shape)

    def infer_shapes(self):
        return [port.name for port in self.engine.spec.inputs if port.name not in self.shapes]

    def get_tensor_shape(self, name):
        batch, new = self.shapes["input_ids"]
        sizes = {BATCH: batch, SEQUENCE: new, PAST: 0}
        for port in self.engine.spec.inputs:  # a cache's third axis: tokens before, or those of the encoder's text
            if port.name.startswith("past_key_values"):
                sizes[str(port.axes[2])] = self.shapes[port.name][2]
        return shape_of(next(port for port in self.engine.spec.outputs if port.name == name), sizes)

    def set_tensor_address(self, name, address):
        assert address, f"{name} has no address"
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        spec, places = self.engine.spec, {}
        for port in spec.inputs:
            places[port.name] = self._memory(port, self.shapes[port.name])
        inputs = {name: array.copy() for name, array in places.items()}
        written = self.engine.runner.run(inputs)
        for port in spec.outputs:
            places[port.name] = self._memory(port, written[port.name].shape)
            for other in spec.inputs:
                assert not np.shares_memory(places[port.name], places[other.name]), f"{port.name} lies on {other.name}"
            places[port.name][...] = written[port.name]
        self.engine.calls.append((self.profile, dict(self.shapes), dict(self.addresses)))
        return True

    def _memory(self, port, shape):
        """The array at an address."""
        if not prod(shape):
            return np.zeros(shape, dtype=port.dtype)
        size = prod(shape) * np.dtype(port.dtype).itemsize
        raw = (ctypes.c_uint8 * size).from_address(self.addresses[port.name])
        return np.frombuffer(raw, dtype=port.dtype).reshape(shape)


class Engine:
    def __init__(self, graph: Path, spec: IoSpec, profiles):
        self.runner, self.spec, self.profiles, self.calls = open_onnx(graph, 1), spec, profiles, []

    def create_execution_context(self):
        return Context(self)


def runner_of(graph: Path, spec: IoSpec, profiles) -> TensorRTRunner:
    """A runner over such an engine, its buffers in the CPU's memory."""
    return TensorRTRunner(Engine(graph, spec, profiles), spec.inputs, spec.outputs, tuple(profiles), device="cpu")

"""A decoder's cache on the GPU that an engine runs on: what one step writes, the next one reads where it lies.
Shapes, profiles and which buffers take turns are `profiles`' arithmetic; contexts are `tensorrt_runner`'s.

Shape letters: B batch, T tokens of one step, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from export.io_spec import IoSpec
from export.profiles import Step, plan_step
from export.tensorrt_runner import TensorRTRunner


@dataclass(frozen=True)
class Kept:
    """What a step leaves for the next one: how many there were, and for how many tokens the last one wrote."""

    steps: int
    tokens: int


@dataclass
class DeviceDecoder:
    """An engine with a cache, step by step. It holds one text's cache at a time: a step goes on after the last one."""

    runner: TensorRTRunner
    spec: IoSpec
    _sets: tuple[dict[str, Any], dict[str, Any]] = field(default_factory=lambda: ({}, {}))
    _last: Kept | None = None

    def advance(
        self, tokens: Mapping[str, np.ndarray], cache: Kept | None, whole: bool = False
    ) -> tuple[np.ndarray, Kept]:
        """See `generate.Decoder`. Without a cache a text begins."""
        with self.runner.stream():
            return self._advance(tokens, cache, whole)

    def _advance(self, tokens: Mapping[str, np.ndarray], cache: Kept | None, whole: bool) -> tuple[np.ndarray, Kept]:
        import torch

        assert cache is None or cache is self._last, "the buffers hold the last step's cache alone"
        batch, new = tokens["input_ids"].shape
        before = cache or Kept(0, 0)
        step = plan_step(self.runner.profiles, self.spec, before.steps, batch, new, before.tokens)
        context = self.runner.context(step.profile)
        for name, shape in step.shapes.items():
            context.set_input_shape(name, shape)
        self._check_outputs(context, step, batch)
        given = {name: torch.from_numpy(value).to(self.runner.device) for name, value in tokens.items()}
        shape = tuple(context.get_tensor_shape("logits"))
        logits = torch.empty(shape, dtype=self._dtype("logits"), device=self.runner.device)
        for name, buffer in (given | {"logits": logits} | self._bind(step, batch)).items():
            context.set_tensor_address(name, buffer.data_ptr())
        self.runner.enqueue(context)
        self.runner.wait()
        self._last = Kept(before.steps + 1, step.kept)
        return (logits if whole else logits[:, -1:]).float().cpu().numpy(), self._last

    def _bind(self, step: Step, batch: int) -> dict[str, Any]:
        """The buffers of every input and output of the cache. A past of length 0 is read from one that is not empty,
        as null is no address."""
        layout = self.spec.cache
        assert layout is not None
        read, written = self._sets[step.reads], self._sets[step.writes]
        bound = {}
        for past, present in zip(layout.past_names, layout.present_names, strict=True):
            token = batch * layout.heads * layout.head_size
            self._make_room(read, past, token, token)
            self._make_room(written, past, step.kept * token, step.room * token)
            bound |= {past: read[past], present: written[past]}
        return bound

    def _make_room(self, held: dict[str, Any], name: str, needed: int, made: int) -> None:
        """A buffer of `made` elements in place of one that has not `needed`. What it held is written anew, or nothing:
        a step reads only what was written for as many tokens."""
        import torch

        if name not in held or held[name].numel() < needed:
            held[name] = torch.empty(made, dtype=self._dtype(name), device=self.runner.device)

    def _check_outputs(self, context: Any, step: Step, batch: int) -> None:
        """An engine that would write more than there is room for is our own mistake, or another model's engine."""
        layout = self.spec.cache
        assert layout is not None
        missing = context.infer_shapes()
        assert not missing, missing
        expected = (batch, layout.heads, step.kept, layout.head_size)
        for name in layout.present_names:
            assert tuple(context.get_tensor_shape(name)) == expected, (name, context.get_tensor_shape(name), expected)

    def _dtype(self, name: str) -> Any:
        import torch

        ports = (*self.runner.inputs, *self.runner.outputs)
        return getattr(torch, next(port.dtype for port in ports if port.name == name))

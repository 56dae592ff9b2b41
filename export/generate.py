"""Text token by token over any runner of a decoder, alone or with its encoder: greedy or sampled, in batches, as a
stream.
Turning text into tokens and back, and ending rows at a stop string, is `texts`' business.

Shape letters: B batch, T tokens of one step, P tokens before it, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from export.device_cache import DeviceDecoder
from export.io_spec import LOGITS_TO_KEEP, IoSpec
from export.runners import CUDA_PROVIDER, TENSORRT_PROVIDER, OnnxRunner, Pair, Runner, TorchRunner
from export.tensorrt_runner import TensorRTRunner
from trainer.errors import UserError

# Where ONNX Runtime keeps a session's cache; any other provider keeps it on the CPU.
_DEVICES = {CUDA_PROVIDER: "cuda", TENSORRT_PROVIDER: "cuda"}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when it ends. Names and meanings are those of transformers' GenerationConfig."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0: all of them."""
    top_p: float = 1.0
    """Only the fewest tokens that have this much probability together."""
    eos_token_ids: tuple[int, ...] = ()
    seed: int = 0
    forced_bos_token_id: int | None = None
    """The first token of every text of an encoder-decoder."""
    forced_eos_token_id: int | None = None
    """The last one of a text that comes to `max_new_tokens`."""

    def __post_init__(self) -> None:
        fine = self.max_new_tokens >= 1 and self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1
        if not fine:
            raise UserError(
                f"{self}", "max_new_tokens of at least 1, temperature and top_k of at least 0, top_p in (0, 1]"
            )


class Decoder(Protocol):
    """One step of a model that keeps its cache where it computes."""

    def advance(
        self, tokens: Mapping[str, np.ndarray], cache: Any | None, whole: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Logits of the last token, [B, 1, V], or of all, [B, T, V], for the token inputs of `IoSpec.token_feeds`, and
        the cache of the next step."""
        ...


@dataclass(frozen=True)
class CopyingDecoder:
    """Any runner: the cache goes through numpy, which costs a copy a step where it lies on a device."""

    runner: Runner
    spec: IoSpec
    encoded: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What every step attends to beside its past."""

    def advance(
        self, tokens: Mapping[str, np.ndarray], cache: Any | None, whole: bool = False
    ) -> tuple[np.ndarray, Any]:
        assert self.spec.cache is not None
        past = self.spec.cache.empty(len(tokens["input_ids"])) if cache is None else cache
        outputs = self.runner.run({**tokens, **self.encoded, **past})
        return outputs["logits"][:, 0 if whole else -1 :], self.spec.cache.next_past(outputs)


@dataclass(frozen=True)
class TorchDecoder:
    """PyTorch: the cache stays in its tensors, on their device."""

    runner: TorchRunner
    spec: IoSpec
    encoded: Mapping[str, Any] = field(default_factory=dict)
    """What every step attends to beside its past: name to tensor."""

    def advance(
        self, tokens: Mapping[str, np.ndarray], cache: Any | None, whole: bool = False
    ) -> tuple[np.ndarray, Any]:
        assert self.spec.cache is not None
        past = self.runner.tensors(self.spec.cache.empty(len(tokens["input_ids"]))) if cache is None else cache
        outputs = self.runner.run_tensors({**self.runner.tensors(tokens), **self.encoded, **past})
        return outputs["logits"][:, 0 if whole else -1 :].cpu().numpy(), self.spec.cache.next_past(outputs)


@dataclass(frozen=True)
class BoundDecoder:
    """ONNX Runtime: what one step puts out is bound as what the next one takes in, where it lies."""

    runner: OnnxRunner
    spec: IoSpec
    encoded: Mapping[str, Any] = field(default_factory=dict)
    """What every step attends to beside its past, where it is computed: name to OrtValue."""

    def advance(
        self, tokens: Mapping[str, np.ndarray], cache: Any | None, whole: bool = False
    ) -> tuple[np.ndarray, Any]:
        from onnxruntime import OrtValue

        layout, session = self.spec.cache, self.runner.session
        assert layout is not None
        device = _device(self.runner)
        if cache is None:
            empty = layout.empty(len(tokens["input_ids"])).values()
            cache = [OrtValue.ortvalue_from_numpy(value, device, 0) for value in empty]
        binding = session.io_binding()
        for name, value in tokens.items():
            binding.bind_cpu_input(name, value)
        for name, value in (*zip(layout.past_names, cache, strict=True), *self.encoded.items()):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in layout.present_names:
            binding.bind_output(name, device)
        session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        return logits.numpy()[:, 0 if whole else -1 :], presents


@dataclass
class Buffers:
    """A cache with room for so many tokens of each row, bound as what a step takes in and puts out."""

    room: int
    arrays: list[np.ndarray]
    """Of `CacheLayout.past_names`, [B, heads, room, size]."""
    binding: Any


@dataclass(frozen=True)
class InPlaceDecoder:
    """ONNX Runtime, where a graph's past may be longer than it is: a step writes its keys and values after those before
    it, and nothing is copied but when the room ends. A cache that went on may not be gone back to."""

    runner: OnnxRunner
    spec: IoSpec
    room: int = 256
    """Tokens for which it is made at once."""

    def advance(
        self, tokens: Mapping[str, np.ndarray], cache: Buffers | None, whole: bool = False
    ) -> tuple[np.ndarray, Buffers]:
        batch, total = tokens["attention_mask"].shape
        if cache is None or cache.room < total:
            cache = self._make_room(batch, total, cache)
        from onnxruntime import OrtValue

        for name, value in (*tokens.items(), (LOGITS_TO_KEEP, np.array(0 if whole else 1))):
            cache.binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(value))
        cache.binding.bind_output("logits", "cpu")
        self.runner.session.run_with_iobinding(cache.binding)
        return cache.binding.get_outputs()[0].numpy(), cache

    def _make_room(self, batch: int, total: int, before: Buffers | None) -> Buffers:
        from onnxruntime import OrtValue

        layout = self.spec.cache
        assert layout is not None
        room = (total // self.room + 1) * self.room
        shape = (batch, layout.heads, room, layout.head_size)
        arrays = [np.empty(shape, dtype=np.float32) for _ in layout.past_names]
        for array, old in zip(arrays, before.arrays if before else (), strict=False):
            array[:, :, : old.shape[2]] = old
        binding = self.runner.session.io_binding()
        binding.bind_output("logits", "cpu")
        for past, present, array in zip(layout.past_names, layout.present_names, arrays, strict=True):
            value = OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        return Buffers(room, arrays, binding)


def decoder_of(runner: Runner, spec: IoSpec, encoded: Mapping[str, np.ndarray] | None = None) -> Decoder:
    """The decoder of a runner, on what an encoder put out, if there is one."""
    if isinstance(runner, TensorRTRunner) and spec.encoder is None:
        return DeviceDecoder(runner, spec)
    if isinstance(runner, TorchRunner):
        return TorchDecoder(runner, spec, runner.tensors(encoded or {}))
    if not isinstance(runner, OnnxRunner):
        return CopyingDecoder(runner, spec, encoded or {})
    device = _device(runner)
    if runner.room_in_past and device == "cpu":
        return InPlaceDecoder(runner, spec)
    from onnxruntime import OrtValue

    kept = {name: OrtValue.ortvalue_from_numpy(value, device, 0) for name, value in (encoded or {}).items()}
    return BoundDecoder(runner, spec, kept)


def _device(runner: OnnxRunner) -> str:
    return _DEVICES.get(runner.session.get_providers()[0], "cpu")


def stream(
    runner: Runner | Pair,
    spec: IoSpec,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    ended_B: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yields the next token of every prompt, int64 [B]; the padding id for rows that have ended. Ends when all have.

    The reader may end a row for reasons of its own: it sets it to True in `ended_B`, bool [B], between two tokens.
    Raises UserError for an empty prompt, or one that leaves the model no room for the new tokens.
    """
    if spec.cache is None:
        raise UserError(f"{spec.architecture} does not generate text", "a causal language model", "name another model")
    _check_prompts(spec, prompts, settings)
    decoder, ids_BT, mask = _begin(runner, spec, prompts)
    random, cache = np.random.default_rng(settings.seed), None
    if ended_B is None:
        ended_B = np.zeros(len(prompts), dtype=bool)
    for step in range(settings.max_new_tokens):
        logits_BTV, cache = decoder.advance(spec.token_feeds(ids_BT, mask), cache)
        free_B = choose(logits_BTV[:, -1], settings, random)
        forced = _forced(spec, settings, step)
        chosen_B = np.where(ended_B, spec.pad_id, free_B if forced is None else forced)
        yield chosen_B
        ended_B |= np.isin(chosen_B, settings.eos_token_ids)
        if ended_B.all() or step + 1 == settings.max_new_tokens:
            return
        ids_BT = chosen_B[:, None]
        if spec.encoder is None:
            mask = np.concatenate([mask, np.ones_like(ids_BT)], axis=1)


def _begin(
    runner: Runner | Pair, spec: IoSpec, prompts: Sequence[Sequence[int]]
) -> tuple[Decoder, np.ndarray, np.ndarray]:
    """What takes the steps, the first tokens that it is given, and the mask, of which each step adds a column.

    With an encoder the prompts are its text, the decoder begins with the start token, and the mask stays.
    """
    rows = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    length = max(map(len, rows))
    if spec.encoder is None:
        assert not isinstance(runner, Pair)
        padded = spec.pad(rows, length, left=True)
        return decoder_of(runner, spec), padded["input_ids"], padded["attention_mask"]
    assert isinstance(runner, Pair) and spec.cross is not None
    padded = spec.encoder.pad(rows, length)
    encoded = spec.cross.next_past(runner.encoder.run(padded))
    first_B1 = np.full((len(rows), 1), spec.start_id, dtype=np.int64)
    return decoder_of(runner.decoder, spec, encoded), first_B1, padded["attention_mask"]


def _forced(spec: IoSpec, settings: Sampling, step: int) -> int | None:
    """The token that a step must give, if there is one."""
    if step + 1 == settings.max_new_tokens and settings.forced_eos_token_id is not None:
        return settings.forced_eos_token_id
    return settings.forced_bos_token_id if step == 0 and spec.encoder else None


def generate(
    runner: Runner | Pair, spec: IoSpec, prompts: Sequence[Sequence[int]], settings: Sampling
) -> list[list[int]]:
    """The new tokens of each prompt, with the token that ended it, if one did."""
    taken = np.stack(list(stream(runner, spec, prompts, settings)), axis=1)
    rows = []
    for row in taken:
        ends = np.flatnonzero(np.isin(row, settings.eos_token_ids))
        rows.append(row[: ends[0] + 1 if len(ends) else None].tolist())
    return rows


def choose(logits_BV: np.ndarray, settings: Sampling, random: np.random.Generator) -> np.ndarray:
    """A token for each row, int64 [B]."""
    if settings.temperature == 0:
        return logits_BV.argmax(axis=1)
    cumulated_BV = probabilities(logits_BV, settings).cumsum(axis=1)
    drawn_B1 = random.random((len(logits_BV), 1)) * cumulated_BV[:, -1:]
    return (cumulated_BV <= drawn_B1).sum(axis=1)


def probabilities(logits_BV: np.ndarray, settings: Sampling) -> np.ndarray:
    """What tokens are drawn with, float64 [B, V]: temperature, then top-k, then top-p, as transformers orders them.

    top-p: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    """
    scores_BV = logits_BV.astype(np.float64) / settings.temperature
    if 0 < settings.top_k < scores_BV.shape[1]:
        kth_B1 = np.partition(scores_BV, -settings.top_k, axis=1)[:, -settings.top_k, None]
        scores_BV = np.where(scores_BV < kth_B1, -np.inf, scores_BV)
    kept_BV = _softmax(scores_BV)
    if settings.top_p < 1:
        order_BV = kept_BV.argsort(axis=1, kind="stable")
        below_BV = np.take_along_axis(kept_BV, order_BV, axis=1).cumsum(axis=1) <= 1 - settings.top_p
        below_BV[:, -1] = False  # the likeliest token stays, whatever rounding says
        rows, places = np.nonzero(below_BV)
        kept_BV[rows, order_BV[rows, places]] = 0
    return kept_BV / kept_BV.sum(axis=1, keepdims=True)


def _softmax(scores_BV: np.ndarray) -> np.ndarray:
    raised_BV = np.exp(scores_BV - scores_BV.max(axis=1, keepdims=True))
    return raised_BV / raised_BV.sum(axis=1, keepdims=True)


def _check_prompts(spec: IoSpec, prompts: Sequence[Sequence[int]], settings: Sampling) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("a prompt is empty", "at least one token in each", "begin it with the tokenizer's bos token")
    longest, room = max(map(len, prompts)), spec.max_length
    # Two texts where there is an encoder, one of which begins with the start token; the last token is never read.
    needed = max(longest, settings.max_new_tokens) if spec.encoder else longest + settings.max_new_tokens
    if needed > room:
        raise UserError(
            f"a prompt of {longest} tokens and {settings.max_new_tokens} new ones",
            f"at most {room} {'of each' if spec.encoder else 'in all'}, what {spec.architecture} of this size takes",
            "shorten the prompt or lower max_new_tokens",
        )
    outside = [token for prompt in prompts for token in prompt if not 0 <= token < spec.vocab_size]
    if outside:
        raise UserError(f"a prompt holds token {outside[0]}", f"ids below {spec.vocab_size}", "mend the tokenizer")

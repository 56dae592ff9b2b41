"""The cache of a decoder under test: cases that go on after a past, and one taken token by token, 64 deep.
What a case may differ from its source, and everything without a cache, is left to `parity` and `cases`.

Shape letters: B batch, T new tokens, P past tokens, S tokens of the prompt.
"""

from itertools import islice

import numpy as np

from export.cases import Case, Documents, tokens
from export.generate import InPlaceDecoder
from export.io_spec import IoSpec
from export.runners import Arrays, OnnxRunner, Runner

DEPTH = 64  # tokens that are taken one by one, each on the cache of those before it
_PROMPT = 5
_ROOM = 32  # of a past that may have some: it ends twice on the way
# (batch, past, new): one token and several, batches of one and more, none of them traced.
_SHAPES = ((1, 1, 1), (1, 20, 5), (2, 7, 3), (7, 16, 1))


def cache_cases(documents: Documents, spec: IoSpec, source: Runner, longest: int, seed: int = 0) -> list[Case]:
    """Cases with a past that `source` made from real text, padded on the left and on the right, and one in steps.

    The longest past leaves room for one token below `longest` or the model's own maximum.
    """
    edge = min(longest, spec.max_length)
    shapes = [shape for shape in _SHAPES if shape[1] + shape[2] <= edge]
    if edge > 1:
        shapes.append((1, edge - 1, 1))
    random = np.random.default_rng(seed)
    cases = []
    for batch, past, new in dict.fromkeys(shapes):
        for side in ("left", "right")[: 1 if batch == 1 else 2]:
            ids, mask = _batch(documents, spec, batch, past, new, random, right=side == "right")
            name = f"{batch}x{new} after {past}" + (f" padded {side}" if batch > 1 else "")
            cases.append(Case(name, spec.feeds(ids[:, past:], mask, past_of(source, spec, ids[:, :past], mask))))
    return [*cases, stepped_case(documents, spec, random)]


def past_of(source: Runner, spec: IoSpec, ids_BP: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """What `source` keeps of the first P tokens."""
    assert spec.cache is not None
    return spec.cache.next_past(source.run(spec.feeds(ids_BP, mask[:, : ids_BP.shape[1]])))


def stepped_case(documents: Documents, spec: IoSpec, random: np.random.Generator) -> Case:
    """A full row, one whose prompt is padded on the left and one padded on the right, for `run_in_steps`."""
    prompt = min(_PROMPT, spec.max_length - 1)
    depth = min(DEPTH, spec.max_length - prompt)
    ids, mask = _batch(documents, spec, 3, 0, prompt + depth, random, right=False)
    mask[1, : prompt // 2] = 0
    mask[2, prompt - prompt // 2 : prompt] = 0
    return Case(f"3x{prompt} and {depth} steps", spec.feeds(ids, mask), steps_after=prompt)


def run_in_steps(runner: Runner, spec: IoSpec, case: Case) -> Arrays:
    """What a decoder gives for a case whose tokens come one by one after the prompt, as if they had come at once.

    A graph that may have room in its past has it here, as in `generate`.
    """
    assert case.steps_after is not None and spec.cache is not None
    if isinstance(runner, OnnxRunner) and runner.room_in_past:
        return _run_in_place(InPlaceDecoder(runner, spec, room=_ROOM), spec, case)
    ids_BT, encoded = case.inputs["input_ids"], case.inputs.get("encoder_attention_mask")
    ends = [case.steps_after, *range(case.steps_after + 1, ids_BT.shape[1] + 1)]
    past = {name: case.inputs[name] for name in spec.cross.past_names} if spec.cross else {}
    start, logits, outputs = 0, [], {}
    for end in ends:
        mask = case.mask[:, :end] if encoded is None else encoded
        outputs = runner.run(spec.feeds(ids_BT[:, start:end], mask, past))
        logits.append(outputs["logits"])
        past |= spec.cache.next_past(outputs)
        start = end
    return {**outputs, "logits": np.concatenate(logits, axis=1)}


def _run_in_place(decoder: InPlaceDecoder, spec: IoSpec, case: Case) -> Arrays:
    assert case.steps_after is not None and spec.cache is not None
    ids_BT, mask_BT = case.inputs["input_ids"], case.mask
    prompt = spec.token_feeds(ids_BT[:, : case.steps_after], mask_BT[:, : case.steps_after])
    whole, _ = decoder.advance(prompt, None, whole=True)
    last, buffers = decoder.advance(prompt, None)
    logits = [whole[:, :-1], last]
    for end in range(case.steps_after + 1, ids_BT.shape[1] + 1):
        step, buffers = decoder.advance(spec.token_feeds(ids_BT[:, end - 1 : end], mask_BT[:, :end]), buffers)
        logits.append(step)
    presents = {
        name: array[:, :, : ids_BT.shape[1]]
        for name, array in zip(spec.cache.present_names, buffers.arrays, strict=True)
    }
    return {"logits": np.concatenate(logits, axis=1), **presents}


def _batch(
    documents: Documents, spec: IoSpec, batch: int, past: int, new: int, random: np.random.Generator, right: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, int64 [B, P + T]: the first row is full, the others' pasts are of unequal lengths."""
    length = past + new
    text = tokens(documents, spec, batch * length)
    ids = np.stack([np.fromiter(islice(text, length), dtype=np.int64) for _ in range(batch)])
    mask = np.ones_like(ids)
    for row in range(1, batch):
        padding = int(random.integers(1, past)) if past > 1 else 0
        mask[row, slice(past - padding, past) if right else slice(0, padding)] = 0
    ids[mask == 0] = spec.pad_id
    return ids, mask

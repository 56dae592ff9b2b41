"""Cases for a decoder that attends to an encoder: real text encoded with padding, pasts of many lengths, and tokens
taken one by one, 64 deep. The encoder's own cases are `cases`', a decoder's that stands alone `cache`'s.

Shape letters: B batch, S tokens of the encoder's text, P past tokens of the decoder, T new ones.
"""

from itertools import islice

import numpy as np

from export.cache import DEPTH
from export.cases import Case, Documents, tokens
from export.io_spec import IoSpec
from export.runners import Pair

# (batch, encoded, past, new): one token and several, batches of one and more, none of them traced.
_SHAPES = ((1, 1, 0, 1), (1, 7, 0, 4), (1, 13, 20, 1), (2, 9, 3, 5), (7, 11, 0, 6), (7, 16, 9, 1))
_STEPPED_BATCH, _STEPPED_ENCODED = 3, 14


def decoder_cases(documents: Documents, spec: IoSpec, source: Pair, longest: int, seed: int = 0) -> list[Case]:
    """Cases whose pasts and encoded text `source` made from real text, the first row full, the others padded on the
    right; one of them in steps, and two with the longest text and the longest past, `longest` or the model's own
    maximum.
    """
    edge = min(longest, spec.max_length)
    shapes = [shape for shape in _SHAPES if max(shape[1], shape[2] + shape[3]) <= edge]
    random = np.random.default_rng(seed)
    cases = []
    for batch, encoded, past, new in dict.fromkeys([*shapes, (1, edge, 0, 2), (2, min(5, edge), edge - 1, 1)]):
        ids, mask, cross = _encoded_batch(documents, spec, source, (batch, encoded, past + new), random)
        kept = cross
        if past and spec.cache is not None:
            kept = cross | spec.cache.next_past(source.decoder.run(spec.feeds(ids[:, :past], mask, cross)))
        name = f"{batch}x{new} after {past} on {encoded}"
        cases.append(Case(name, spec.feeds(ids[:, past:], mask, kept), past_tokens=past))
    depth = min(DEPTH, edge - 1)
    shape = (_STEPPED_BATCH, min(_STEPPED_ENCODED, edge), 1 + depth)
    ids, mask, cross = _encoded_batch(documents, spec, source, shape, random)
    name = f"{shape[0]}x1 and {depth} steps on {shape[1]}"
    return [*cases, Case(name, spec.feeds(ids, mask, cross), steps_after=1)]


def _encoded_batch(
    documents: Documents, spec: IoSpec, source: Pair, shape: tuple[int, int, int], random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The decoder's ids, which begin with the start token, the encoder's mask, and keys and values of its text."""
    assert spec.encoder is not None and spec.cross is not None
    batch, encoded, length = shape
    text = tokens(documents, spec, batch * (encoded + length))
    lengths_B = random.integers(1, encoded, size=batch, endpoint=True)
    lengths_B[0] = encoded
    rows = [np.fromiter(islice(text, int(size)), dtype=np.int64) for size in lengths_B]
    inputs = spec.encoder.pad(rows, encoded)
    ids = np.stack([np.fromiter(islice(text, length), dtype=np.int64) for _ in range(batch)])
    ids[:, 0] = spec.start_id
    return ids, inputs["attention_mask"], spec.cross.next_past(source.encoder.run(inputs))

"""Whether an engine gives its graph's numbers on the GPU that is here: real text in shapes that its profiles take.
What may differ is `parity`'s business, which text is `cases`', `cache`'s and `cross_cases`'; which engines are held,
`rebuild`'s and `to_tensorrt`'s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from export.cache import cache_cases
from export.cases import Case, Documents, full_rows, make_cases
from export.cross_cases import decoder_cases
from export.generate import decoder_of
from export.io_spec import IoSpec, Port
from export.parity import check_parity
from export.profiles import Profile, call_shapes, fitting_profile, taken_cases
from export.runners import Arrays, Pair, Runner
from export.tensorrt_runner import TensorRTRunner
from trainer.errors import UserError
from trainer.export_config import Parity, Tolerance


@dataclass(frozen=True)
class InSteps:
    """A decoder that takes a batch without padding token by token after its first few, its cache kept on the device."""

    runner: TensorRTRunner
    spec: IoSpec
    first: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        decoder, cache, logits, start = decoder_of(self.runner, self.spec), None, [], 0
        ids_BT, mask = inputs["input_ids"], inputs["attention_mask"]
        for end in range(self.first, ids_BT.shape[1] + 1):
            found, cache = decoder.advance(
                self.spec.token_feeds(ids_BT[:, start:end], mask[:, :end]), cache, whole=True
            )
            logits.append(found)
            start = end
        return {"logits": np.concatenate(logits, axis=1)}


def prove_engine(
    what: str,
    spec: IoSpec,
    engine: TensorRTRunner,
    source: Runner | Pair,
    documents: Documents,
    settings: Parity,
    tolerance: Tolerance,
    seed: int = 0,
) -> dict[str, Any]:
    """Hold an engine against `source` on the cases of `settings` that its profiles take; evidence of passing.

    An engine with a cache is held after pasts of many lengths, too, and with its cache kept on the device. For the one
    of a decoder with an encoder `source` is both graphs. GateFailed where it differs, UserError where its profiles take
    no case.
    """
    whole = min(settings.max_length, spec.max_length)
    graph = source.decoder if isinstance(source, Pair) else source
    cases = taken_cases(engine.profiles, spec, _cases(spec, engine, source, documents, settings, seed))
    if not cases:
        raise UserError(f"{what}: no case of export.parity.shapes is within a profile", "one", "add such a shape")
    expected = [graph.run(case.inputs) for case in cases]
    candidate: Any = engine  # it has an OnnxRunner's face
    evidence = check_parity(what, spec, candidate, cases, expected, tolerance)
    if spec.cache is None or spec.encoder is not None:  # one with an encoder hands its cache on through the host
        return evidence
    batch, first, length = steps_within(engine.profiles, spec, whole)
    if length:
        case, logits = full_rows(documents, spec, batch, length), spec.outputs[:1]
        stepping: Any = InSteps(engine, spec, first, spec.inputs, logits)
        what = f"{what}, its cache on the device"
        check_parity(what, replace(spec, outputs=logits), stepping, [case], [graph.run(case.inputs)], tolerance)
    return evidence | {"metrics": evidence["metrics"] | {"tokens_on_device": length}}


def _cases(
    spec: IoSpec, engine: TensorRTRunner, source: Runner | Pair, documents: Documents, settings: Parity, seed: int
) -> list[Case]:
    """All cases of a graph of such a kind, also those that no profile takes."""
    of_text = "encoder_attention_mask" if spec.encoder else "input_ids"
    longest = min(settings.max_length, max(profile[of_text][2][1] for profile in engine.profiles))
    if spec.encoder is not None:
        assert isinstance(source, Pair)
        return decoder_cases(documents, spec, source, longest, seed)
    cases = make_cases(documents, spec, settings.shapes, longest, seed)
    if spec.cache is not None:
        cases += cache_cases(documents, spec, source, min(settings.max_length, spec.max_length), seed)
    return cases


def steps_within(profiles: Sequence[Profile], spec: IoSpec, longest: int) -> tuple[int, int, int]:
    """The smallest batch and prompt of the first profile, and the length up to which profiles take one token more;
    0 where they do not take the prompt, or nothing after it."""
    batch, first = profiles[0]["input_ids"][0]
    calls = [(first, 0), *((1, past) for past in range(first, longest))]
    length = 0
    for new, past in calls:
        if fitting_profile(profiles, call_shapes(spec, batch, new, past)) is None:
            break
        length = past + new
    return batch, first, length if length > first else 0

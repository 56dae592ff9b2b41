"""Which of an engine's profiles takes a call, and which calls a decoder makes, as arithmetic of shapes.
The profiles themselves are the recipe's and the manifest's; running calls is `tensorrt_runner`'s and `device_cache`'s.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from export.cases import Case
from export.io_spec import BATCH, ENCODED, PAST, SEQUENCE, IoSpec, Port
from trainer.errors import UserError

Shapes = dict[str, tuple[int, ...]]
# For each input its smallest, best tuned and largest shape, as manifests hold it.
Profile = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Step:
    """One call of a decoder whose cache lies in two sets of buffers that take turns: no call may write what it reads.

    `kept`: tokens whose keys and values the written set holds afterwards; `room`: for how many a set that is too small
    is made, twice as many as far as the model goes, so that a text of any length makes it a few times only.
    """

    profile: int
    shapes: Shapes
    reads: int
    writes: int
    kept: int
    room: int


def plan_step(profiles: Sequence[Profile], spec: IoSpec, number: int, batch: int, new: int, past: int) -> Step:
    """What call `number` (0: the prompt's) of `new` tokens after `past` needs; UserError where no profile takes it."""
    shapes = call_shapes(spec, batch, new, past)
    kept = past + new
    return Step(
        profile=require_profile(profiles, shapes),
        shapes=shapes,
        reads=(number + 1) % 2,
        writes=number % 2,
        kept=kept,
        room=min(2 * kept, max(kept, spec.max_length)),
    )


def fitting_profile(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The first profile that takes inputs of these shapes; None where none does."""
    return next((index for index, profile in enumerate(profiles) if _takes(profile, shapes)), None)


def require_profile(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> int:
    """The same; UserError where none does."""
    found = fitting_profile(profiles, shapes)
    if found is None:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise UserError(f"no profile of the engine takes {listed}", "shapes within tensorrt.profiles", "add a profile")
    return found


def call_shapes(spec: IoSpec, batch: int, new: int, past: int, encoded: int = 0) -> Shapes:
    """Shapes of all inputs for `new` tokens after `past` ones, with an encoder on a text of `encoded`."""
    sizes = {BATCH: batch, SEQUENCE: new, PAST: past, ENCODED: encoded}
    return {port.name: shape_of(port, sizes) for port in spec.inputs}


def shape_of(port: Port, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a port. An axis `a + b` is the sum of its parts."""
    return tuple(
        axis if isinstance(axis, int) else sum(sizes[part] for part in axis.split(" + ")) for axis in port.axes
    )


def taken_cases(profiles: Sequence[Profile], spec: IoSpec, cases: Sequence[Case]) -> list[Case]:
    """The cases of which the profiles take every call."""
    return [case for case in cases if all(fitting_profile(profiles, call) is not None for call in calls_of(spec, case))]


def calls_of(spec: IoSpec, case: Case) -> Iterator[Shapes]:
    """Shapes of the calls that a case is: one or, of a case in steps, its prompt's and one for each token."""
    if case.steps_after is None:
        yield {name: value.shape for name, value in case.inputs.items()}
        return
    batch, length = case.inputs["input_ids"].shape
    encoded = case.inputs["encoder_attention_mask"].shape[1] if spec.encoder else 0
    yield call_shapes(spec, batch, case.steps_after, 0, encoded)
    yield from (call_shapes(spec, batch, 1, past, encoded) for past in range(case.steps_after, length))


def _takes(profile: Profile, shapes: Mapping[str, Sequence[int]]) -> bool:
    for name, shape in shapes.items():
        low, _, high = profile[name]
        if not all(least <= axis <= most for least, axis, most in zip(low, shape, high, strict=True)):
            return False
    return True

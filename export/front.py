"""`export.variants: auto`: which forms are worth having, of those that passed the gates: the front of quality, latency
and size, as far as they can be told apart. Making forms and holding them against their source is `export`'s; timing
calls is `windows`'.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from export.cases import Documents, full_rows
from export.io_spec import IoSpec
from export.noise import difference
from export.runners import Runner, usable_threads
from export.windows import Settings, SystemClock, measure
from trainer.environment import launch_command
from trainer.errors import GateFailed, UserError
from trainer.export_config import Precision

# Quick windows, enough to tell forms apart: the benchmark's own take three times as long.
_WINDOWS = Settings(usable_threads(), window_s=0.1, max_windows=10, stability=0.1)
_KEPT = "kept"
_LENGTH = 128  # of the text: the longest of the benchmark's default shapes


@dataclass(frozen=True)
class Form:
    """A form that passed. `quality`: share kept of the source's or, without a gate on it, 1 - relative_rms.

    `quality_range` is its 95 % bootstrap interval; of 1 - relative_rms, which the same inputs always give, there is
    none. `latency_noise`: by how much two measurements differ, each of the form opened anew, relative to the shorter.
    `latency_ms` is None where others had the CPU, so that none of its windows counts.
    """

    variant: Precision
    quality: float
    latency_ms: float | None
    size_mib: float
    quality_range: tuple[float, float] | None = None
    latency_noise: float = 0.0

    def __str__(self) -> str:
        range = "" if self.quality_range is None else " ({:.2%} to {:.2%})".format(*self.quality_range)
        noise = f" (±{self.latency_noise:.0%})" if self.latency_noise else ""
        latency = "latency unknown" if self.latency_ms is None else f"{self.latency_ms:.3g} ms{noise}"
        return f"quality {self.quality:.2%}{range}, {latency}, {self.size_mib:.1f} MiB"


@dataclass(frozen=True)
class Choice:
    """The forms that passed, and for every variant that was tried what became of it."""

    passed: list[Form]
    became: dict[Precision, str]

    @property
    def kept(self) -> tuple[Precision, ...]:
        return tuple(form.variant for form in self.passed if self.became[form.variant].startswith(_KEPT))

    def evidence(self, timed: str) -> dict[str, Any]:
        """The choice as an artifact records it; `timed` says what the latencies are of."""
        forms = {form.variant: asdict(form) for form in self.passed}
        metrics = {"timed": timed, "forms": forms, "became": self.became, "kept": self.kept}
        return {"what": "variants_auto", "command": launch_command(), "metrics": metrics}


def choose(variants: Sequence[Precision], attempt: Callable[[Precision], Form]) -> Choice:
    """Try each variant and keep the front of those that pass.

    `attempt` makes a form and holds it against its source; a UserError or GateFailed of it is why there is none, or,
    of fp32, ends the search.
    """
    passed: list[Form] = []
    became: dict[Precision, str] = {}
    for variant in variants:
        try:
            passed.append(attempt(variant))
        except (UserError, GateFailed) as problem:
            if variant == "fp32":  # all others are made of it, and have looser gates
                raise
            found = str(problem).split("\nDo:")[0].replace("\n", "; ")
            became[variant] = f"refused: {found}"
    # Left out only for what is kept: a first that beats a second need not beat a third that the second beats.
    unbeaten = [form for form in passed if not any(beats(one, form) for one in passed)]
    for form in passed:
        better = next((one for one in unbeaten if beats(one, form)), None)
        became[form.variant] = f"left out: {form}; {better.variant}: {better}" if better else f"{_KEPT}: {form}"
    return Choice(passed, became)


def beats(one: Form, other: Form) -> bool:
    """Whether `one` is better in something and worse in nothing, where less than the noise is neither.

    Of an unknown latency nobody is better.
    """
    if one.latency_ms is None or other.latency_ms is None:
        return False
    gains, losses = _better_in(one, other), _better_in(other, one)
    return any(gains) and not any(losses)


def _better_in(one: Form, other: Form) -> tuple[bool, bool, bool]:
    """Where `one` is better beyond noise: in quality if the intervals do not meet, in latency if it is quicker by more
    than either differs from itself, in size if it is smaller."""
    assert one.latency_ms is not None and other.latency_ms is not None
    least = (one.quality_range or (one.quality,))[0]
    most = (other.quality_range or (other.quality,))[-1]
    apart = difference(one.latency_ms, other.latency_ms) > max(one.latency_noise, other.latency_noise)
    return least > most, apart and one.latency_ms < other.latency_ms, one.size_mib < other.size_mib


def measure_form(
    variant: Precision,
    proofs: Iterable[Mapping[str, Any]],
    open_form: Callable[[], Runner],
    inputs: dict[str, np.ndarray],
    size: float,
) -> Form:
    """A form with the quality that its gates found, and the time of one call on `inputs`, measured twice."""
    found = {proof["what"]: proof["metrics"] for proof in proofs}
    quality = found.get(f"quality_{variant}")
    first_ms, again_ms = _latency_ms(open_form(), inputs), _latency_ms(open_form(), inputs)
    latency_ms, noise = None, 0.0
    if first_ms is not None and again_ms is not None:
        latency_ms, noise = (first_ms + again_ms) / 2, difference(first_ms, again_ms)
    if quality is None:
        near = 1 - max(metrics["relative_rms"] for what, metrics in found.items() if "parity_" in what)
        return Form(variant, near, latency_ms, size, None, noise)
    return Form(variant, quality["kept"], latency_ms, size, (quality["kept_low"], quality["kept_high"]), noise)


def _latency_ms(runner: Runner, inputs: dict[str, np.ndarray]) -> float | None:
    timed = measure(lambda: runner.run(inputs), _WINDOWS, SystemClock())
    return float(np.median(timed.calls_s)) * 1e3 if timed.stable else None


def timed_inputs(documents: Documents, spec: IoSpec) -> tuple[str, dict[str, np.ndarray]]:
    """What is timed, and its inputs: a row of text or, of a model that generates, the next token after one; of an
    encoder-decoder the first token, for which both of its graphs run."""
    length = min(_LENGTH, spec.max_length)
    if spec.encoder is not None:
        return f"the first token on a text of {length}", full_rows(documents, spec.encoder, 1, length).inputs
    if spec.cache is None:
        return f"one text of {length} tokens", full_rows(documents, spec, 1, length).inputs
    past_length = length - 1
    shape = (1, spec.cache.heads, past_length, spec.cache.head_size)
    random = np.random.default_rng(0)  # what a cache holds does not move the time
    past = {name: random.standard_normal(shape, dtype=np.float32) for name in spec.cache.past_names}
    token = full_rows(documents, spec, 1, 1).inputs["input_ids"]
    return f"one token after {past_length}", spec.feeds(token, np.ones((1, length), dtype=np.int64), past)

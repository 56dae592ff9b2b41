"""`export.variants: auto`: which forms are worth having, of those that passed the gates: the front of quality, latency
and size. Making forms and holding them against their source is `export`'s; timing calls is `windows`'.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from export.cases import Documents, full_rows
from export.io_spec import IoSpec
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

    `latency_ms` is None where others had the CPU, so that none of its windows counts.
    """

    variant: Precision
    quality: float
    latency_ms: float | None
    size_mib: float

    def __str__(self) -> str:
        latency = "latency unknown" if self.latency_ms is None else f"{self.latency_ms:.3g} ms"
        return f"quality {self.quality:.2%}, {latency}, {self.size_mib:.1f} MiB"


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
    for form in passed:
        better = next((one for one in passed if beats(one, form)), None)
        became[form.variant] = f"left out: {form}; {better.variant}: {better}" if better else f"{_KEPT}: {form}"
    return Choice(passed, became)


def beats(one: Form, other: Form) -> bool:
    """Whether `one` is better in something and worse in nothing. Of an unknown latency nobody is better."""
    if one.latency_ms is None or other.latency_ms is None:
        return False
    gains = (one.quality - other.quality, other.latency_ms - one.latency_ms, other.size_mib - one.size_mib)
    return min(gains) >= 0 and max(gains) > 0


def measure_form(
    variant: Precision, proofs: Iterable[Mapping[str, Any]], runner: Runner, inputs: dict[str, np.ndarray], size: float
) -> Form:
    """A form with the quality that its gates found, and the time of one call on `inputs`."""
    found = {proof["what"]: proof["metrics"] for proof in proofs}
    quality = found.get(f"quality_{variant}")
    near = 1 - max(metrics["relative_rms"] for what, metrics in found.items() if "parity_" in what)
    timed = measure(lambda: runner.run(inputs), _WINDOWS, SystemClock())
    latency_ms = float(np.median(timed.calls_s)) * 1e3 if timed.stable else None
    return Form(variant, quality["kept"] if quality else near, latency_ms, size)


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

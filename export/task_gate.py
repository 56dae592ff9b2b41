"""The gate on what a model is for: a form of it must keep a share of its source's quality on validation text.
Near logits are `parity`'s matter; which text is scored, and how, is `bench_inputs`' and `scores`'.

Shape letters: R rows of text, S samples of the bootstrap.
"""

from typing import Any

import numpy as np

from export.scores import Scores
from trainer.errors import GateFailed

_SAMPLES = 2000
_CONFIDENCE = 0.95
_FEWEST_ROWS = 30  # of a bootstrap that tells something, by the usual rule; one row's interval has no width at all


def kept_share(source: Scores, candidate: Scores) -> float:
    """The candidate's quality over the source's: 1 as good, lower is worse. Of perplexities it is the inverse ratio."""
    if source.metric == "perplexity":
        return source.value / candidate.value
    return candidate.value / source.value


def interval(source: Scores, candidate: Scores, seed: int = 0) -> tuple[float, float]:
    """95 % interval of `kept_share` by the percentile bootstrap (Efron & Tibshirani 1993): rows are drawn anew.

    Both models are scored on the same rows, so that what makes a row hard for both does not widen it.
    """
    random = np.random.default_rng(seed)
    rows = len(source.sums_R)
    drawn_SR = random.integers(0, rows, size=(_SAMPLES, rows))
    with np.errstate(divide="ignore", invalid="ignore"):
        theirs_S, ours_S = (
            scores.sums_R[drawn_SR].sum(axis=1) / scores.counts_R[drawn_SR].sum(axis=1)
            for scores in (source, candidate)
        )
        shares_S = np.exp(theirs_S - ours_S) if source.metric == "perplexity" else ours_S / theirs_S
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.nanquantile(shares_S, [tail, 1 - tail])
    return float(low), float(high)


def check_quality(what: str, source: Scores, candidate: Scores, share: float) -> dict[str, Any]:
    """Hold `candidate` against `source`; returns the evidence of passing.

    Raises GateFailed if less than `share` is kept, or if the interval reaches below it and is wider than twice what may
    be lost on either side, so that passing would mean nothing.
    """
    if source.metric != "perplexity" and not source.sums_R.any():
        raise GateFailed(
            f"{what}: the source itself gets none of {source.counts_R.sum()} targets right ({source.metric})",
            "a model with some quality to keep",
            "set export.quality to null for a model that was not trained",
        )
    if len(source.sums_R) < _FEWEST_ROWS:
        raise GateFailed(
            f"{what}: {len(source.sums_R)} rows of text to judge quality by",
            f"{_FEWEST_ROWS} or more",
            "raise export.quality.sequences, give it more validation text, or set export.quality to null",
        )
    kept, (low, high) = kept_share(source, candidate), interval(source, candidate)
    seen = f"{source.metric} {candidate.value:.4g} against {source.value:.4g}, {kept:.2%} ({low:.2%} to {high:.2%})"
    if not kept >= share:
        raise GateFailed(f"{what}: {seen} of its source's quality is kept", f"{share:.2%}")
    if low < share and high - low > 4 * (1 - share):
        raise GateFailed(
            f"{what}: {seen} of its source's quality is kept, which is too wide an interval to tell",
            f"one of at most {4 * (1 - share):.2%}, or above {share:.2%}",
            "raise export.quality.sequences, or give it more text",
        )
    return {
        "metrics": {
            "metric": source.metric,
            "source": source.value,
            "value": candidate.value,
            "kept": kept,
            "kept_low": low,
            "kept_high": high,
            "sequences": len(source.sums_R),
            "targets": int(source.counts_R.sum()),
        },
        "thresholds": {"share": share},
    }

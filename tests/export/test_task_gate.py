"""The task gate: a form that loses quality fails though its tensors are near, and too little text is no proof."""

import numpy as np
import pytest

from export.gates import Gates
from export.io_spec import read_spec
from export.runners import open_onnx, open_torch
from export.scores import Scores, score
from export.task_gate import check_quality, interval, kept_share
from trainer.errors import GateFailed
from trainer.export_config import Export

ROWS, TARGETS = 200, 50


def perplexities(worse=0.0, noise=0.0, seed=0):
    """Scores of rows that are hard to unequal degrees, each `worse` nats a token, give or take `noise`."""
    hardness_R = np.random.default_rng(7).normal(3.0, 0.5, ROWS)
    random_R = np.random.default_rng(seed).normal(worse, noise, ROWS)
    return Scores("perplexity", (hardness_R + random_R) * TARGETS, np.full(ROWS, TARGETS))


def test_an_equal_form_keeps_everything():
    evidence = check_quality("m", perplexities(), perplexities(), 0.999)
    assert evidence["metrics"]["kept"] == evidence["metrics"]["kept_low"] == 1.0
    assert evidence["thresholds"] == {"share": 0.999}


@pytest.mark.parametrize(("worse", "passes"), [(0.004, True), (0.03, False), (-0.03, True)])
def test_a_loss_of_quality_is_caught(worse, passes):
    """Perplexity grows by exp(worse): 0.4 % is within 1 %, 3 % is not, and a better form is no failure."""
    source, candidate = perplexities(), perplexities(worse, 0.01)
    assert kept_share(source, candidate) == pytest.approx(np.exp(-worse), rel=2e-3)
    if passes:
        check_quality("m", source, candidate, 0.99)
    else:
        with pytest.raises(GateFailed, match=r"m: perplexity .* 97\.\d+% \(96\.\d+% to 97\.\d+%\) of its source's"):
            check_quality("m", source, candidate, 0.99)


def test_a_loss_within_the_noise_is_a_loss():
    """98.7 % of 99 %: that the interval reaches above is no reason to let it pass."""
    source, candidate = perplexities(), perplexities(0.013, 0.05)
    low, high = interval(source, candidate)
    assert low < kept_share(source, candidate) < 0.99 < high
    with pytest.raises(GateFailed, match=r"98\.\d+% .* of its source's quality is kept"):
        check_quality("m", source, candidate, 0.99)


def test_the_interval_is_that_of_paired_rows():
    """Its width is the differences' alone, by the normal approximation, though the rows differ far more."""
    source, candidate = perplexities(), perplexities(0.0, 0.05)
    low, high = interval(source, candidate)
    difference_R = (candidate.sums_R - source.sums_R) / TARGETS
    assert (high - low) / 2 == pytest.approx(1.96 * difference_R.std() / np.sqrt(ROWS), rel=0.1)
    assert low < kept_share(source, candidate) < high


def test_too_little_text_proves_nothing():
    """Each form is right where the other is wrong: as good on these rows, but that may be chance."""
    right_R, counts_R = np.tile([2.0, 0, 1, 1], 10), np.full(40, 5)
    source = Scores("masked_accuracy", right_R, counts_R)
    candidate = Scores("masked_accuracy", right_R[::-1], counts_R)
    with pytest.raises(GateFailed, match=r"(?s)too wide an interval to tell.*at most 4.00%"):
        check_quality("m", source, candidate, 0.99)
    one = Scores("masked_accuracy", np.array([3.0]), np.array([5]))  # whose interval has no width
    with pytest.raises(GateFailed, match=r"(?s)1 rows of text to judge quality by.*30 or more"):
        check_quality("m", one, one, 0.99)


def test_a_source_without_quality_is_refused():
    nothing = Scores("masked_accuracy", np.zeros(4), np.full(4, 5))
    with pytest.raises(GateFailed, match=r"(?s)none of 20 targets right.*export.quality to null"):
        check_quality("m", nothing, nothing, 0.99)


def test_a_form_of_near_tensors_and_lost_quality_is_caught(model_folder, raw_graph, documents):
    """Limits of the tensors that let everything pass leave it to the task."""
    anything = {"relative_rms": 1e3, "max_abs": None, "min_top1": 0.0}
    settings = Export.model_validate(
        {"parity": {"fp32": anything}, "quality": {"sequences": 40, "sequence_length": 8, "share": 0.98}}
    )
    folder = model_folder("gpt2", 1)
    gates = Gates(folder, read_spec(folder), settings, documents, lambda needed: documents, seed=0)
    own, other = raw_graph("gpt2", 1), raw_graph("gpt2")
    evidence = gates.check("m", "fp32", own, open_onnx(own, 1))
    assert [proof["what"] for proof in evidence] == ["parity_fp32", "quality_fp32"]
    assert evidence[1]["metrics"]["kept"] == pytest.approx(1.0, abs=1e-5)
    assert evidence[1]["sha256"] == evidence[0]["sha256"]
    with pytest.raises(GateFailed, match=r"m: perplexity .* of its source's quality is kept"):
        gates.check("m", "fp32", other, open_onnx(other, 1))


def test_rows_are_scored_one_by_one(model_folder):
    """The rows' sums are those of each row alone."""
    spec, runner = read_spec(model_folder("gpt2")), open_torch(model_folder("gpt2"), 1)
    rows = [np.arange(5, 20), np.arange(30, 37)]
    together = score(runner, [spec.pad(rows, 15)], "perplexity")
    alone = [score(runner, [spec.pad([row], len(row))], "perplexity") for row in rows]
    np.testing.assert_allclose(together.sums_R, [one.sums_R[0] for one in alone], rtol=1e-5)
    assert together.counts_R.tolist() == [14, 6]

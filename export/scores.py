"""How good a language model's logits are, row by row: right masked tokens, or the likelihood of each next token.
Running the model, and what is made of the scores, is left to the benchmark and the task gate.

Shape letters: B batch, T sequence length, V vocabulary, N targets, R rows of all batches.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from export.runners import Runner

NOT_A_TARGET = -100  # as transformers and PyTorch's cross entropy mark it


@dataclass(frozen=True)
class Scores:
    """A sum and a number of targets for each row: right ones, or negative log-likelihoods in nats.

    Of entity_f1 the sum is twice the entities found, and the targets are those said and those there are.
    """

    metric: str
    sums_R: np.ndarray
    counts_R: np.ndarray

    @property
    def value(self) -> float:
        """masked_accuracy: share of masked tokens that get the highest logit. perplexity: exp of the mean negative
        log-likelihood of each target given the tokens before it in its row, of an encoder-decoder also given the
        encoder's text. accuracy, answer_f1: mean over rows. All rows
        together."""
        mean = float(self.sums_R.sum() / self.counts_R.sum())
        return float(np.exp(mean)) if self.metric == "perplexity" else mean


def score(runner: Runner, batches: Iterable[Mapping[str, np.ndarray]], metric: str) -> Scores:
    """Scores of `runner` on batches of inputs, with `labels`, -100 where a token is no target; without them each token
    is the target of the position before it."""
    found = []
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits_BTV = runner.run(inputs)["logits"]
        if metric == "masked_accuracy":
            found.append(_right(logits_BTV, batch["labels"]))
        elif "labels" in batch:
            found.append(_nll(logits_BTV, batch["labels"]))
        else:
            next_BT = np.where(inputs["attention_mask"][:, 1:], inputs["input_ids"][:, 1:], NOT_A_TARGET)
            found.append(_nll(logits_BTV[:, :-1], next_BT))
    sums, counts = zip(*found, strict=True)
    return Scores(metric, np.concatenate(sums), np.concatenate(counts))


def _right(logits_BTV: np.ndarray, labels_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    target_BT = labels_BT >= 0
    right_BT = (logits_BTV.argmax(axis=2) == labels_BT) & target_BT
    return right_BT.sum(axis=1).astype(np.float64), target_BT.sum(axis=1)


def _nll(logits_BTV: np.ndarray, labels_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    target_BT = labels_BT >= 0
    sums_B = np.zeros(len(target_BT))
    for row, target_T in enumerate(target_BT):  # one at a time: a batch in float64 would take gigabytes
        logits_NV = logits_BTV[row][target_T].astype(np.float64)
        labels_N = labels_BT[row][target_T]
        highest_N = logits_NV.max(axis=1)
        log_total_N = np.log(np.exp(logits_NV - highest_N[:, None]).sum(axis=1)) + highest_N
        sums_B[row] = (log_total_N - logits_NV[np.arange(len(labels_N)), labels_N]).sum()
    return sums_B, target_BT.sum(axis=1)

"""Labelled text to hold a form of a model to: rows of a jsonl file, and how many of them a head gets right.
What share of the source's score must be kept is the task gate's business.

Shape letters: B batch, T sequence length, C classes.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.io_spec import IoSpec
from export.runners import Arrays, Runner
from export.scores import Scores
from trainer.errors import UserError

# Task to its metric. Those of tokens count whole entities, as CoNLL-2003 does (Tjong Kim Sang & De Meulder 2003); those
# of answers the words that they share, as SQuAD does (Rajpurkar et al. 2016).
METRICS = {"classification": "accuracy", "token_classification": "entity_f1", "question_answering": "answer_f1"}
# Keys of a row, and what they hold.
_KEYS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "classification": {"text": str, "label": (str, int)},
    "token_classification": {"tokens": list, "labels": list},
    "question_answering": {"question": str, "context": str, "answers": list},
}
_BATCH = 8
_LONGEST_ANSWER_TOKENS = 30  # transformers' run_qa.py, max_answer_length
Row = dict[str, Any]
# The sum and the number of targets of one row, from its outputs and its place in the batch's encoding.
Judge = Callable[[Row, dict[str, np.ndarray], Any, int], tuple[float, int]]


def labelled_scorer(folder: Path, spec: IoSpec, path: Path, most: int) -> Callable[[Runner], Scores]:
    """What scores a runner of the model in `folder` on up to `most` rows of `path`, taken evenly over the file.

    Raises UserError for a file or a row that does not fit the model's task and labels.
    """
    from transformers import AutoConfig, AutoTokenizer

    rows = read_rows(path, spec.task, most)
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if config.problem_type in ("regression", "multi_label_classification"):
        raise UserError(
            f"{folder} is trained for {config.problem_type}", "one label a text: there is no accuracy of it"
        )
    known = {config.id2label[index]: index for index in range(config.num_labels)}
    judge = _judge(spec, path, rows, known)
    batches = [rows[first : first + _BATCH] for first in range(0, len(rows), _BATCH)]

    def scorer(runner: Runner) -> Scores:
        found = []
        for batch in batches:
            encoding = _encode(tokenizer, spec, batch)
            outputs = runner.run(_inputs(spec, encoding))
            found += [
                judge(row, {name: value[index] for name, value in outputs.items()}, encoding, index)
                for index, row in enumerate(batch)
            ]
        sums, counts = zip(*found, strict=True)
        return Scores(METRICS[spec.task], np.array(sums, dtype=np.float64), np.array(counts))

    return scorer


def read_rows(path: Path, task: str, most: int) -> list[Row]:
    """Up to `most` rows, evenly over the file; UserError with the line of one that is not what the task needs."""
    if not path.is_file():
        raise UserError(f"export.quality.labelled: {path} is not there", "a jsonl file", "mend the path")
    lines = [(number, line) for number, line in enumerate(path.read_text("utf-8").splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"export.quality.labelled: {path} is empty", "labelled rows")
    return [_row(path, number, line, task) for number, line in lines[:: -(-len(lines) // most)]]


def _row(path: Path, number: int, line: str, task: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    keys = _KEYS[task]
    if not isinstance(row, dict) or not all(isinstance(row.get(key), kind) for key, kind in keys.items()):
        needed = ", ".join(f"{key} ({_named(kind)})" for key, kind in keys.items())
        raise UserError(f"{path}:{number}: {line[:80]}", f"an object with {needed}, for a {task} model")
    if task == "token_classification" and len(row["tokens"]) != len(row["labels"]):
        raise UserError(f"{path}:{number}: {len(row['tokens'])} tokens and {len(row['labels'])} labels", "as many")
    return row


def _named(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join({str: "text", int: "its number", list: "a list"}[one] for one in kinds)


def _encode(tokenizer: Any, spec: IoSpec, rows: Sequence[Row]) -> Any:
    """A padded batch. Rows that are longer than the model takes are cut: of a pair the context is."""
    common = {"padding": True, "truncation": True, "max_length": spec.max_length, "return_tensors": "np"}
    if spec.task == "classification":
        return tokenizer([row["text"] for row in rows], **common)
    if spec.task == "token_classification":
        return tokenizer([row["tokens"] for row in rows], is_split_into_words=True, **common)
    pairs = [row["question"] for row in rows], [row["context"] for row in rows]
    return tokenizer(*pairs, **(common | {"truncation": "only_second", "return_offsets_mapping": True}))


def _inputs(spec: IoSpec, encoding: Any) -> Arrays:
    made = spec.feeds(encoding["input_ids"].astype(np.int64), encoding["attention_mask"].astype(np.int64))
    if "token_type_ids" in made and "token_type_ids" in encoding:
        made["token_type_ids"] = encoding["token_type_ids"].astype(np.int64)
    return made


def _judge(spec: IoSpec, path: Path, rows: Sequence[Row], known: dict[str, int]) -> Judge:
    """How a row is judged; UserError where the rows have labels that the model has not, or nothing to be found."""
    if spec.task == "question_answering":
        return _judge_answer
    labels = {label for row in rows for label in (row["labels"] if "labels" in row else [row["label"]])}
    unknown = sorted(str(label) for label in labels if label not in known and label not in known.values())
    if unknown:
        raise UserError(f"{path} has labels {', '.join(unknown[:5])}", f"the model's: {', '.join(known)}")
    names = list(known)
    if spec.task == "token_classification":
        if not any(entities([_name(label, names) for label in row["labels"]]) for row in rows):
            raise UserError(f"{path} has no entity in {len(rows)} rows", "some: labels other than O")
        return lambda row, outputs, encoding, index: _judge_entities(row, outputs["logits"], encoding, index, names)
    return lambda row, outputs, encoding, index: (
        float(names[int(outputs["logits"].argmax())] == _name(row["label"], names)),
        1,
    )


def _name(label: str | int, names: Sequence[str]) -> str:
    return names[label] if isinstance(label, int) else label


def _judge_entities(
    row: Row, logits_TC: np.ndarray, encoding: Any, index: int, names: Sequence[str]
) -> tuple[float, int]:
    """Twice the entities that were found, and those that were said and those that there are: their ratio is F1.

    A word has the label of its first token; words that were cut off do not count.
    """
    first: dict[int, int] = {}
    for token, word in enumerate(encoding.word_ids(index)):
        if word is not None:
            first.setdefault(word, token)
    said = entities([names[int(logits_TC[first[word]].argmax())] for word in sorted(first)])
    true = entities([_name(row["labels"][word], names) for word in sorted(first)])
    return 2.0 * len(said & true), len(said) + len(true)


def entities(labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first and last word of each entity: B- begins one, I- (or no prefix) goes on with one of its type."""
    found: list[tuple[str, int, int]] = []
    for place, label in enumerate(labels):
        prefix, kind = (label[0], label[2:]) if label[:2] in ("B-", "I-") else ("I", label)
        if kind == "O":
            continue
        if found and prefix != "B" and found[-1][0] == kind and found[-1][2] == place - 1:
            found[-1] = (kind, found[-1][1], place)
        else:
            found.append((kind, place, place))
    return set(found)


def _judge_answer(row: Row, outputs: dict[str, np.ndarray], encoding: Any, index: int) -> tuple[float, int]:
    """The best F1 of the likeliest span with one of the answers."""
    in_context_T = np.array([number == 1 for number in encoding.sequence_ids(index)])
    start_T, end_T = (np.where(in_context_T, outputs[f"{end}_logits"], -np.inf) for end in ("start", "end"))
    scores_TT = start_T[:, None] + end_T[None, :]
    scores_TT[~np.tri(len(start_T), k=_LONGEST_ANSWER_TOKENS - 1, dtype=bool)] = -np.inf
    scores_TT[np.tri(len(start_T), k=-1, dtype=bool)] = -np.inf
    first, last = np.unravel_index(scores_TT.argmax(), scores_TT.shape)
    offsets = encoding["offset_mapping"][index]
    said = row["context"][offsets[first][0] : offsets[last][1]]
    return max(word_f1(said, answer) for answer in row["answers"] or [""]), 1


def word_f1(said: str, true: str) -> float:
    """F1 of the words of two answers, without case, punctuation and articles."""
    left, right = (Counter(_words(text)) for text in (said, true))
    common = (left & right).total()
    if not left or not right:
        return float(left == right)
    return 2 * common / (left.total() + right.total())


def _words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()

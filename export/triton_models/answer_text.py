"""Triton's Python backend: the network's outputs to an answer in JSON, in the words of transformers' pipelines.
It runs in the server, without lmworks; settings.json and tokenizer.json beside it say how.

Shape letters: B batch, T sequence length, V vocabulary, C classes, S candidate spans.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports] - the server has it
from tokenizers import Encoding, Tokenizer

_LONGEST_ANSWER_TOKENS = 15  # of a question's answer: the pipeline's max_answer_len


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        here = Path(args["model_repository"], args["model_version"])
        self.settings = json.loads((here / "settings.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.answer_row = {
            "masked_lm": self._fill_mask,
            "causal_lm": self._next_token,
            "classification": self._classify,
            "token_classification": self._group_entities,
            "question_answering": self._find_answer,
        }[self.settings["task"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        given = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.settings["inputs"]]
        try:
            rows = zip(*(_readable(column) for column in given), strict=True)
            answers = [json.dumps(self.answer_row(*row), ensure_ascii=False).encode("utf-8") for row in rows]
        except ValueError as problem:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(problem)))
        return pb_utils.InferenceResponse([pb_utils.Tensor("ANSWER", np.array(answers, dtype=object)[:, None])])

    def _fill_mask(self, ids_T: np.ndarray, mask_T: np.ndarray, logits_TV: np.ndarray) -> list[list[dict[str, Any]]]:
        """For each mask token the likeliest tokens, and the text with each of them in place of it."""
        mask_T = mask_T.astype(bool)
        places = np.flatnonzero((ids_T == self.settings["mask_id"]) & mask_T)
        if not len(places):
            raise ValueError(f"no mask token in the text: write {self.settings['mask_token']} where one is wanted")
        answers = []
        for place in places:
            candidates = self._likeliest(logits_TV[place])
            for candidate in candidates:
                filled_T = ids_T.copy()
                filled_T[place] = candidate["token"]
                # As the pipeline: of several, the other mask tokens stay to be seen.
                alone = len(places) == 1
                candidate["sequence"] = self.tokenizer.decode(filled_T[mask_T].tolist(), skip_special_tokens=alone)
            answers.append(candidates)
        return answers

    def _next_token(self, ids_T: np.ndarray, mask_T: np.ndarray, logits_TV: np.ndarray) -> list[dict[str, Any]]:
        """The likeliest tokens after the text."""
        return self._likeliest(logits_TV[np.flatnonzero(mask_T)[-1]])

    def _classify(self, ids_T: np.ndarray, mask_T: np.ndarray, logits_C: np.ndarray) -> list[dict[str, Any]]:
        activations = {"softmax": softmax, "sigmoid": sigmoid, "none": np.asarray}
        scores_C = activations[self.settings["activation"]](logits_C)
        order = np.argsort(-scores_C, kind="stable")[: self.settings["top_k"]]
        return [{"label": self.settings["labels"][index], "score": float(scores_C[index])} for index in order]

    def _group_entities(
        self, ids_T: np.ndarray, mask_T: np.ndarray, logits_TC: np.ndarray, text: str
    ) -> list[dict[str, Any]]:
        """Neighbours of one tag together, as the pipeline's aggregation `simple`: B- begins anew, O is left out."""
        encoding = self.tokenizer.encode(text)
        scores_TC = softmax(logits_TC)
        tokens = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0).tolist()
        labels = {place: self.settings["labels"][scores_TC[place].argmax()] for place in tokens}
        groups: list[list[int]] = []
        for place in tokens:
            prefix, tag = split_label(labels[place])
            if groups and prefix != "B" and tag == split_label(labels[groups[-1][-1]])[1]:
                groups[-1].append(place)
            else:
                groups.append([place])
        return [
            {
                "entity_group": labels[group[0]].split("-", 1)[-1],
                "score": float(np.mean([scores_TC[place].max() for place in group])),
                "word": self._word(text, encoding, group),
                "start": encoding.offsets[group[0]][0],
                "end": encoding.offsets[group[-1]][1],
            }
            for group in groups
            if labels[group[0]].split("-", 1)[-1] != "O"
        ]

    def _find_answer(
        self, ids_T: np.ndarray, mask_T: np.ndarray, start_T: np.ndarray, end_T: np.ndarray, question: str, context: str
    ) -> list[dict[str, Any]]:
        """The best spans of the context, widened to whole words; those of the same text are one, scores added up."""
        encoding = self.tokenizer.encode(question, context)
        length, wanted = len(encoding), self.settings["top_k"]
        in_context_T = np.array([number == 1 for number in encoding.sequence_ids])
        # The pipeline lets the class token, which stands for "no answer", have its share of the probability.
        cls_T = np.array(encoding.ids) == self.settings["cls_id"]
        start_T, end_T = (shares(logits_T[:length], in_context_T | cls_T) for logits_T in (start_T, end_T))
        answers: dict[str, dict[str, Any]] = {}
        # As many candidates as the pipeline takes, since spans of one text become one.
        for first, last, score in best_spans(start_T * in_context_T, end_T * in_context_T, 2 * wanted + 10):
            start, end = whole_words(encoding, first, last)
            text = context[start:end]
            if text.lower() in answers:
                answers[text.lower()]["score"] += score
            else:
                answers[text.lower()] = {"score": score, "start": start, "end": end, "answer": text}
        return sorted(answers.values(), key=lambda one: one["score"], reverse=True)[:wanted]

    def _word(self, text: str, encoding: Encoding, group: list[int]) -> str:
        """The tokens of a group as the tokenizer joins them; of unknown ones the text."""
        unknown = self.settings["unk_id"]
        words = [
            text[slice(*encoding.offsets[place])] if encoding.ids[place] == unknown else encoding.tokens[place]
            for place in group
        ]
        return self.tokenizer.decoder.decode(words) if self.tokenizer.decoder else " ".join(words)

    def _likeliest(self, logits_V: np.ndarray) -> list[dict[str, Any]]:
        scores_V = softmax(logits_V)
        best = np.argsort(-scores_V, kind="stable")[: self.settings["top_k"]].tolist()
        return [
            {"score": float(scores_V[token]), "token": token, "token_str": self.tokenizer.decode([token], False)}
            for token in best
        ]


def split_label(label: str) -> tuple[str, str]:
    """Prefix and tag: B-PER is ("B", "PER"); a label without a prefix goes on like one with I-."""
    return (label[0], label[2:]) if label[:2] in ("B-", "I-") else ("I", label)


def best_spans(start_T: np.ndarray, end_T: np.ndarray, most: int) -> list[tuple[int, int, float]]:
    """First token, last token and score of the likeliest spans: the product of what their ends have."""
    scores_TT = np.tril(np.triu(np.outer(start_T, end_T)), _LONGEST_ANSWER_TOKENS - 1)
    order_S = np.argsort(-scores_TT, axis=None, kind="stable")[:most]
    places = zip(*(axis_S.tolist() for axis_S in np.unravel_index(order_S, scores_TT.shape)), strict=True)
    return [(first, last, float(scores_TT[first, last])) for first, last in places if scores_TT[first, last] > 0]


def whole_words(encoding: Encoding, first: int, last: int) -> tuple[int, int]:
    """Characters of the context from the word of token `first` to that of `last`; of the tokens where none is known."""
    words = [encoding.token_to_word(token) for token in (first, last)]
    spans = [encoding.word_to_chars(word, 1) for word in words if word is not None]
    known = [span for span in spans if span is not None]
    if len(known) < len(words):
        return encoding.offsets[first][0], encoding.offsets[last][1]
    return known[0][0], known[1][1]


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def shares(logits_T: np.ndarray, allowed_T: np.ndarray) -> np.ndarray:
    """Softmax among the allowed tokens; 0 for the others."""
    return softmax(np.where(allowed_T, logits_T, -np.inf))


def _readable(column: np.ndarray) -> np.ndarray | list[str]:
    """Texts [B, 1] as str, and numbers as fp32 whatever the engine's precision; ids and masks as they are."""
    if column.dtype == object:
        return [text.decode("utf-8") for text in column.reshape(-1)]
    return column.astype(np.float32) if column.dtype.kind == "f" else column

"""Triton's Python backend: the network's logits to an answer in JSON, in the words of transformers' pipelines.
It runs in the server, without lmworks; settings.json and tokenizer.json beside it say how.

Shape letters: B batch, T sequence length, V vocabulary, C classes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports] - the server has it
from tokenizers import Tokenizer


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        here = Path(args["model_repository"], args["model_version"])
        self.settings = json.loads((here / "settings.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
        self.answer_row = {
            "masked_lm": self._fill_mask,
            "causal_lm": self._next_token,
            "classification": self._classify,
        }[self.settings["task"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        names = ("input_ids", "attention_mask", self.settings["output"])
        ids_BT, mask_BT, logits = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names)
        rows = zip(ids_BT, mask_BT.astype(bool), logits.astype(np.float32), strict=True)
        try:
            answers = [json.dumps(self.answer_row(*row), ensure_ascii=False).encode("utf-8") for row in rows]
        except ValueError as problem:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(problem)))
        return pb_utils.InferenceResponse([pb_utils.Tensor("ANSWER", np.array(answers, dtype=object)[:, None])])

    def _fill_mask(self, ids_T: np.ndarray, mask_T: np.ndarray, logits_TV: np.ndarray) -> list[list[dict[str, Any]]]:
        """For each mask token the likeliest tokens, and the text with each of them in place of it."""
        places = np.flatnonzero((ids_T == self.settings["mask_id"]) & mask_T)
        if not len(places):
            raise ValueError(f"no mask token in the text: write {self.settings['mask_token']} where one is wanted")
        answers = []
        for place in places:
            candidates = self._likeliest(logits_TV[place])
            for candidate in candidates:
                filled_T = ids_T.copy()
                filled_T[place] = candidate["token"]
                candidate["sequence"] = self.tokenizer.decode(filled_T[mask_T].tolist())
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

    def _likeliest(self, logits_V: np.ndarray) -> list[dict[str, Any]]:
        scores_V = softmax(logits_V)
        best = np.argsort(-scores_V, kind="stable")[: self.settings["top_k"]].tolist()
        return [
            {"score": float(scores_V[token]), "token": token, "token_str": self.tokenizer.decode([token], False)}
            for token in best
        ]


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max())
    return raised / raised.sum()

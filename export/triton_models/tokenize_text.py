"""Triton's Python backend: texts to the network's inputs, padded so that requests can share a call.
It runs in the server, without lmworks; settings.json and tokenizer.json beside it say how."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports] - the server has it
from tokenizers import Encoding, Tokenizer


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        here = Path(args["model_repository"], args["model_version"])
        self.settings = json.loads((here / "settings.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        names = self.settings["texts"]
        given = [pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1) for name in names]
        try:
            texts = [[text.decode("utf-8") for text in column] for column in given]
            # A pair of texts is a tuple of two, a text alone is itself.
            rows = self.tokenizer.encode_batch(list(zip(*texts, strict=True)) if len(texts) > 1 else texts[0])
            self._check(rows)
        except ValueError as problem:  # a UnicodeDecodeError is one too
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(problem)))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in self._inputs(rows).items()])

    def _check(self, rows: list[Encoding]) -> None:
        longest = max(len(row) for row in rows)
        if longest > self.settings["max_length"]:
            raise ValueError(f"a text has {longest} tokens; the model takes {self.settings['max_length']}")
        if not all(len(row) for row in rows):
            raise ValueError("a text without tokens: there is nothing to answer")

    def _inputs(self, rows: list[Encoding]) -> dict[str, np.ndarray]:
        """All inputs of the network; those that no text decides (a cache) are empty or zero."""
        step = self.settings["pad_to_multiple_of"]
        longest = max(len(row) for row in rows)
        length = min(-(-longest // step) * step, self.settings["max_length"])
        ids_BT = np.full((len(rows), length), self.settings["pad_id"], dtype=np.int64)
        mask_BT, types_BT = np.zeros_like(ids_BT), np.zeros_like(ids_BT)
        for index, row in enumerate(rows):
            ids_BT[index, : len(row)] = row.ids
            types_BT[index, : len(row)] = row.type_ids if self.settings["token_types"] else 0
            mask_BT[index, : len(row)] = 1
        made = {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "token_type_ids": types_BT,
            "position_ids": np.maximum(mask_BT.cumsum(axis=1) - 1, 0),
        }
        arrays = {}
        for port in self.settings["inputs"]:
            empty = np.zeros([len(rows), *port["dims"]])
            arrays[port["name"]] = np.ascontiguousarray(made.get(port["name"], empty), dtype=port["dtype"])
        return arrays

"""Triton's Python backend: what an encoder made of texts, to the texts that the decoder writes, greedily.
It runs in the server, without lmworks; the decoder is another model of the server, which is called for each token.

Shape letters: B batch, S tokens of the encoded text, T tokens written.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports] - the server has it
from tokenizers import Tokenizer

_MASK = "attention_mask"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        here = Path(args["model_repository"], args["model_version"])
        self.settings = json.loads((here / "settings.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """All requests are written together: Triton's dynamic batching brings together only those of one shape."""
        rows = [{name: _array(request, name) for name in (_MASK, *self.settings["encoded"])} for request in requests]
        joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        try:
            written_BT = self._write(joined.pop(_MASK), joined)
        except RuntimeError as problem:
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(problem)))] * len(requests)
        answers = np.array([self._answer(row_T) for row_T in written_BT], dtype=object)[:, None]
        ends = np.cumsum([len(row[_MASK]) for row in rows])[:-1]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("ANSWER", part)]) for part in np.split(answers, ends)]

    def _write(self, mask_BS: np.ndarray, encoded: dict[str, np.ndarray]) -> np.ndarray:
        """The tokens of each text, the padding id once it has ended."""
        settings, batch = self.settings, len(mask_BS)
        fixed = {settings["encoded"][name]: value for name, value in encoded.items()} | {
            "encoder_attention_mask": mask_BS
        }
        past = {name: np.zeros([batch, *settings["empty"]], dtype=np.float32) for name in settings["cache"].values()}
        tokens_B1 = np.full((batch, 1), settings["start_id"], dtype=np.int64)
        ended_B, written = np.zeros(batch, dtype=bool), []
        while len(written) < settings["max_new_tokens"] and not ended_B.all():
            logits_BTV, past = self._step({"input_ids": tokens_B1, **fixed, **past})
            chosen_B = logits_BTV[:, -1].argmax(axis=-1)
            forced = self._forced(len(written))
            chosen_B = chosen_B if forced is None else np.full_like(chosen_B, forced)
            chosen_B = np.where(ended_B, settings["pad_id"], chosen_B)
            written.append(chosen_B)
            ended_B |= np.isin(chosen_B, settings["ends"])
            tokens_B1 = chosen_B[:, None].astype(np.int64)
        return np.stack(written, axis=1)

    def _forced(self, step: int) -> int | None:
        if step + 1 == self.settings["max_new_tokens"] and self.settings["forced_last"] is not None:
            return self.settings["forced_last"]
        return self.settings["forced_first"] if step == 0 else None

    def _step(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits of the next token, and the cache of the next step. RuntimeError with the decoder's own words."""
        cache = self.settings["cache"]
        request = pb_utils.InferenceRequest(
            model_name=self.settings["decoder"],
            requested_output_names=["logits", *cache],
            inputs=[pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in inputs.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise RuntimeError(f"{self.settings['decoder']}: {response.error().message()}")
        found = {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in ("logits", *cache)}
        return found["logits"], {past: found[present] for present, past in cache.items()}

    def _answer(self, written_T: np.ndarray) -> bytes:
        """In the words of transformers' text-to-text pipeline. What was written after a text's end is padding."""
        ends = np.flatnonzero(np.isin(written_T, self.settings["ends"]))
        kept = written_T[: ends[0] if len(ends) else None].tolist()
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return json.dumps([{"generated_text": text}], ensure_ascii=False).encode("utf-8")


def _array(request: Any, name: str) -> np.ndarray:
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()

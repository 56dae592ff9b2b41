"""Text in, text out over `generate`: streams of text in whole characters, and rows that end at a stop string.
Choosing tokens is `generate`'s matter; opening models, and showing what they say, the callers'.

Shape letters: B batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from export.generate import Sampling, stream
from export.io_spec import IoSpec
from export.runners import Pair, Runner
from trainer.errors import UserError

# A character of UTF-8 has at most so many bytes, and a token holds one at least: after as many it is no character.
_CHARACTER_TOKENS = 4
_NO_CHARACTER = "\ufffd"
# What a folder's generation_config.json may ask for that is not done here, as transformers names it.
_NOT_DONE = ("num_beams", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "repetition_penalty", "min_length",
             "min_new_tokens", "bad_words_ids", "suppress_tokens")  # fmt: skip


class GrowingText:
    """The text of one row while its tokens come.

    Text is given out in whole characters, and only as far as it cannot be the beginning of a stop string. What is
    searched for these strings is the new text alone, never the prompt.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str], ends: Sequence[int]) -> None:
        self.text = ""
        """All that was given out."""
        self.tokens: list[int] = []
        """The new tokens, with those that ended it."""
        self.ended_by: Literal["", "token", "string"] = ""
        """What ended it; nothing while it goes on, or where the tokens came to their number."""
        self._tokenizer, self._stops, self._ends = tokenizer, tuple(stops), frozenset(ends)
        # Tokens are decoded together with some before them: the text of one depends on its neighbours in all kinds of
        # tokenizers. Those from `begin` to `read` gave the text that is out already.
        self._ids, self._begin, self._read = list(prompt), 0, len(prompt)
        self._held = ""

    def take(self, token: int) -> str:
        """Add a token; the text that can be given out now."""
        if self.ended_by:
            return ""
        self.tokens.append(token)
        if token in self._ends:
            self.ended_by = "token"
            return self.close()
        self._ids.append(token)
        self._held += self._decoded()
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.ended_by = "string"
            return self._give(min(found), drop=True)
        return self._give(len(self._held) - self._possible_stop())

    def close(self) -> str:
        """The rest, when no more tokens come. Bytes at the end that are no whole character are left out."""
        return self._give(len(self._held))

    def _decoded(self) -> str:
        """The text of the tokens that were not read yet; nothing while a character lacks some of its bytes."""
        end = len(self._ids)
        before, now = self._decode(self._ids[self._begin : self._read]), self._decode(self._ids[self._begin :])
        if now.endswith(_NO_CHARACTER):
            if end - self._read < _CHARACTER_TOKENS:
                return ""
            end = self._read + 1  # the first is part of no character; the others may begin one
            now = self._decode(self._ids[self._begin : end])
        self._begin, self._read = self._read, end
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _possible_stop(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=0)
        for size in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0

    def _give(self, size: int, drop: bool = False) -> str:
        given, self._held = self._held[:size], "" if drop else self._held[size:]
        self.text += given
        return given


def stream_texts(
    runner: Runner | Pair,
    spec: IoSpec,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: Sampling,
    stops: Sequence[str] = (),
) -> Iterator[list[GrowingText]]:
    """Yields the growing texts of all prompts after each token, and once more when all are whole.

    A stop string ends its row and is left out of the text, wherever tokens divide it; one that is a special token of
    the tokenizer's ends it as a token. Raises UserError for prompts and settings as `stream` does.
    """
    if "" in stops:
        raise UserError("a stop string is empty", "at least one character", "leave it out")
    special = [stop for stop in stops if stop in tokenizer.all_special_tokens]
    ends = (*settings.eos_token_ids, *map(int, tokenizer.convert_tokens_to_ids(special)))
    rows = [prompt_tokens(tokenizer, prompt, spec.encoder is not None) for prompt in prompts]
    strings = [stop for stop in stops if stop not in special]
    texts = [GrowingText(tokenizer, [] if spec.encoder else row, strings, ends) for row in rows]
    ended_B = np.zeros(len(rows), dtype=bool)
    for chosen_B in stream(runner, spec, rows, replace(settings, eos_token_ids=ends), ended_B):
        for text, token in zip(texts, chosen_B.tolist(), strict=True):
            text.take(token)
        ended_B[:] = [bool(text.ended_by) for text in texts]
        yield texts
    for text in texts:
        text.close()
    yield texts


def generate_texts(
    runner: Runner | Pair,
    spec: IoSpec,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: Sampling,
    stops: Sequence[str] = (),
) -> list[GrowingText]:
    """The whole texts, their tokens and what ended them, as `stream_texts` says."""
    *_, texts = stream_texts(runner, spec, tokenizer, prompts, settings, stops)
    return texts


def prompt_tokens(tokenizer: Any, prompt: str, encoded: bool = False) -> list[int]:
    """A prompt as a model goes on from it: the tokenizer's bos token where it puts one, and nothing behind the text.

    One that is encoded is whole, with all that the tokenizer puts around it.
    """
    if encoded:
        return tokenizer(prompt, verbose=False)["input_ids"] if prompt else []
    around = tokenizer("")["input_ids"]
    begins = around[:1] if around and around[0] == tokenizer.bos_token_id else []
    return [*begins, *tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]]


def with_end(settings: Sampling, folder: Path) -> Sampling:
    """The settings with the tokens that end a text, and those that are forced, as the model's folder names them."""
    named = _generation_config(folder)
    ends, last = _several(named.eos_token_id), _several(named.forced_eos_token_id)
    return replace(
        settings,
        eos_token_ids=ends,
        forced_bos_token_id=named.forced_bos_token_id,
        forced_eos_token_id=last[0] if last else None,
    )


def not_done(folder: Path) -> list[str]:
    """What the model's folder asks for that is not done here, such as `num_beams=4`: its texts may be others then."""
    named = _generation_config(folder)
    asked = {name: getattr(named, name, None) for name in _NOT_DONE}
    return [f"{name}={value}" for name, value in asked.items() if value not in (None, 0, 1)]


def _generation_config(folder: Path) -> Any:
    from transformers import AutoConfig, GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, local_files_only=True))


def _several(named: int | list[int] | None) -> tuple[int, ...]:
    return tuple(named) if isinstance(named, list) else () if named is None else (named,)

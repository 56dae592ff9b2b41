"""Real tokenized text for the parity gate and the benchmark: validation documents of the recipe, or, for a model that
came without data, the sources of Python's standard library. Running models on it is left to others.

Shape letters: B batch, T sequence length.
"""

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from export.io_spec import IoSpec
from trainer.config import Prepare, Recipe
from trainer.errors import UserError

Documents = Sequence[np.ndarray]
# Enough for any grid of cases; reading all of a large corpus would only cost time.
_MAX_DOCUMENTS = 512
_STDLIB_FILES = 40


@dataclass(frozen=True)
class Case:
    """One batch to compare on. Its source takes it at once, the candidate too, or token by token after a prompt."""

    name: str
    inputs: dict[str, np.ndarray]
    steps_after: int | None = None
    past_tokens: int = 0
    """Of a decoder with an encoder, whose own tokens have no mask: none of them is padding."""

    @property
    def mask(self) -> np.ndarray:
        """All that attention may see: bool [B, P + T]."""
        if "attention_mask" not in self.inputs:
            batch, length = self.inputs["input_ids"].shape
            return np.ones((batch, self.past_tokens + length), dtype=bool)
        return self.inputs["attention_mask"].astype(bool)

    @property
    def mask_BT(self) -> np.ndarray:
        """Real tokens of the input."""
        return self.mask[:, -self.inputs["input_ids"].shape[1] :]


def load_documents(recipe: Recipe, model: Path, limit: int = _MAX_DOCUMENTS) -> list[np.ndarray]:
    """Token ids (int64) of up to `limit` documents: of the recipe's validation split, else the standard library's text.

    A model with another vocabulary than the shards' gets the same text in its own tokens, read anew from the sources.
    Raises UserError when no text can be had: no shards yet, no files any more, or no tokenizer in the model's folder.
    """
    if recipe.prepare is None:
        return stdlib_documents(model)[:limit]
    from trainer.data.shards import TokenShards

    difference = vocabulary_difference(model, recipe.tokenizer_dir)
    if difference:
        return _validation_text_of(recipe, recipe.prepare, model, difference, limit)
    shards = TokenShards.open(recipe.data_dir, "validation")
    step = max(1, -(-len(shards) // limit))  # evenly spaced, as the documents of one source stand together
    documents = [shards.read(index) for index in range(0, len(shards), step)]
    if not documents:
        raise UserError(f"{recipe.data_dir} has no validation documents", "some", "raise prepare.validation_fraction")
    return documents


def stdlib_documents(model: Path) -> list[np.ndarray]:
    """Source files of Python's standard library in the tokens of the model's own tokenizer."""
    return _encode(open_tokenizer(model), stdlib_texts(gates=True))


def stdlib_texts(gates: bool) -> Iterator[str]:
    """The source files of Python's standard library that gates take, or the others."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = files[:_STDLIB_FILES] if gates else files[_STDLIB_FILES:]
    return (file.read_text(encoding="utf-8", errors="replace") for file in chosen)


def vocabulary_difference(model: Path, tokenizer: Path) -> str:
    """The first token that has another id in the model's own tokenizer than in another one; nothing if none has."""
    theirs, ours = (open_tokenizer(folder).get_vocab() for folder in (model, tokenizer))
    if theirs == ours:
        return ""
    token = min(dict(theirs.items() ^ ours.items()))
    return f"{token!r} has id {theirs.get(token)} there, {ours.get(token)} in the run's data"


def _validation_text_of(recipe: Recipe, prepare: Prepare, model: Path, difference: str, limit: int) -> list[np.ndarray]:
    """The recipe's validation text in the tokens of a model that came from elsewhere."""
    from trainer.data.corpus import split_texts

    each = max(1, limit // len(prepare.sources))
    try:
        documents = _encode(open_tokenizer(model), split_texts(prepare, "validation", each))
    except UserError as error:
        found = str(error).split("\n")[0]
        raise UserError(
            f"{model} reads other tokens than {recipe.data_dir} holds ({difference}), and its text is gone: {found}",
            "the text of prepare.sources, to encode it anew",
            "bring the files back, or export this model with a recipe without `prepare`",
        ) from None
    if not documents:
        raise UserError(f"no validation text for {model}", "some in prepare.sources", "raise validation_fraction")
    return documents


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder; UserError where there is none."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")):
        raise UserError(f"{folder} has no tokenizer files", "a tokenizer beside the model", "save it into that folder")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _encode(tokenizer: Any, texts: Iterable[str]) -> list[np.ndarray]:
    encoded = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts if text)
    return [np.asarray(ids, dtype=np.int64) for ids in encoded if ids]


def make_cases(
    documents: Documents, spec: IoSpec, shapes: Sequence[tuple[int, int]], longest: int, seed: int = 0
) -> list[Case]:
    """Padded batches of real text: the given (batch, length) shapes as far as the model takes them, and the edges.

    In a batch the first row is full and the others have unequal lengths, each at least 1. The edges are lengths 1 and
    `longest` or the model's own maximum, in batches of one (and of two for length 1).
    """
    edge = min(longest, spec.max_length)
    fitting = [shape for shape in shapes if shape[1] <= spec.max_length]
    wanted = dict.fromkeys([(1, 1), (2, 1), *fitting, (1, edge)])
    random = np.random.default_rng(seed)
    text = tokens(documents, spec, sum(batch * length for batch, length in wanted))
    cases = []
    for batch, length in wanted:
        lengths_B = random.integers(1, length, size=batch, endpoint=True)
        lengths_B[0] = length
        rows = [np.fromiter(islice(text, int(length)), dtype=np.int64) for length in lengths_B]
        cases.append(Case(f"{batch}x{length}", spec.pad(rows, length)))
    return cases


def full_rows(documents: Documents, spec: IoSpec, batch: int, length: int) -> Case:
    """A batch for measuring speed: every position holds a token of real text, nothing is padding."""
    text = tokens(documents, spec, batch * length)
    rows = [np.fromiter(islice(text, length), dtype=np.int64) for _ in range(batch)]
    return Case(f"{batch}x{length}", spec.pad(rows, length))


def tokens(documents: Documents, spec: IoSpec, needed: int) -> Iterator[int]:
    """The documents' tokens one after another, from the start again if they are fewer than `needed`.

    Raises UserError if there are none, or if they do not fit the model's vocabulary.
    """
    stream = np.concatenate([np.empty(0, dtype=np.int64), *documents])
    if not len(stream):
        raise UserError("there is no text to run the model on", "documents with tokens", "check the prepared data")
    if stream.max() >= spec.vocab_size:
        raise UserError(
            f"the text holds token {stream.max()}", f"ids below {spec.vocab_size}, the model's", "mend the tokenizer"
        )
    return iter(np.resize(stream, max(needed, 1)).tolist())

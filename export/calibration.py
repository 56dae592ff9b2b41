"""Batches of real text on which the ranges of a form's values are measured: text that none of its gates takes.
What is made of the ranges is `precision`'s, `quantize`'s and `fp8`'s; the gates' own text is `cases`'.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from export.cases import Documents, open_tokenizer, stdlib_texts, tokens, vocabulary_difference
from export.io_spec import IoSpec
from trainer.config import Recipe
from trainer.errors import UserError
from trainer.export_config import Calibration

# Documents of one source stand together: so many are taken evenly over all of them.
_MAX_DOCUMENTS = 512
# Finds as many tokens of text as it is asked for that are in none of the gates' documents.
FindText = Callable[[int], Documents]


def text_finder(recipe: Recipe, model: Path, gates: Documents) -> FindText:
    """What finds calibration's text: training documents or, without a `prepare`, further files of the standard library.

    It raises UserError where there is less than it is asked for. `gates` are the gates' documents, which are passed
    over wherever they occur, too.
    """
    taken = {document.tobytes() for document in gates}

    def find(needed: int) -> list[np.ndarray]:
        found, size = [], 0
        for document in _candidates(recipe, model):
            if size >= needed:
                return found
            if document.tobytes() not in taken:
                found.append(document)
                size += len(document)
        if size >= needed:
            return found
        raise UserError(
            f"there are {size} tokens of text for {model} that no gate takes",
            f"{needed}, to measure ranges on",
            "lower batches, batch_size or sequence_length of export.calibration, or give `prepare` more text",
        )

    return find


def _candidates(recipe: Recipe, model: Path) -> Iterator[np.ndarray]:
    if recipe.prepare is None:
        yield from _encoded(model, stdlib_texts(gates=False))
        return
    if vocabulary_difference(model, recipe.tokenizer_dir):
        from trainer.data.corpus import split_texts

        yield from _encoded(
            model, split_texts(recipe.prepare, "train", max(1, _MAX_DOCUMENTS // len(recipe.prepare.sources)))
        )
        return
    from trainer.data.shards import TokenShards

    shards = TokenShards.open(recipe.data_dir, "train")
    step = max(1, len(shards) // _MAX_DOCUMENTS)
    yield from (shards.read(index) for start in range(step) for index in range(start, len(shards), step))


def _encoded(model: Path, texts: Iterable[str]) -> Iterator[np.ndarray]:
    tokenizer = open_tokenizer(model)
    for text in texts:
        yield np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def needed_tokens(spec: IoSpec, settings: Calibration) -> int:
    """How many tokens `calibration_batches` takes."""
    return settings.batch_size * sum(_lengths(spec, settings))


def calibration_batches(find: FindText, spec: IoSpec, settings: Calibration) -> list[dict[str, np.ndarray]]:
    """Batches of real text, the last row of each half padding.

    Their lengths are halved from one to the next down to 1, and begin anew: short inputs have other ranges. A tiny BERT
    that was calibrated on 64 tokens only was off by 57 % on a single token.
    """
    needed = needed_tokens(spec, settings)
    text = tokens(find(needed), spec, needed)
    batches = []
    for length in _lengths(spec, settings):
        rows = [np.fromiter(islice(text, length), dtype=np.int64) for _ in range(settings.batch_size)]
        batches.append(spec.pad([*rows[:-1], rows[-1][: max(1, length // 2)]], length))
    return batches


def _lengths(spec: IoSpec, settings: Calibration) -> list[int]:
    longest = min(settings.sequence_length, spec.max_length)
    halvings = [longest >> step for step in range(longest.bit_length())]
    return [halvings[index % len(halvings)] for index in range(settings.batches)]

"""Calibration's text: never the gates' own, whatever the recipe has, and refused where there is too little of it."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from export import export as stage
from export.calibration import calibration_batches, needed_tokens, text_finder
from export.cases import load_documents, stdlib_documents
from export.gates import Gates
from export.io_spec import read_spec
from tests.export.test_export import SETTINGS
from trainer import prepare
from trainer.config import Recipe
from trainer.data.shards import TokenShards
from trainer.errors import UserError
from trainer.export_config import Calibration


@pytest.fixture
def little(tmp_path):
    """A prepared recipe whose validation split holds a few lines only."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of the text" for number in range(60)))
    source = {"type": "text", "paths": [str(text)], "document": "line"}
    tokenizer = {"type": "wordpiece", "vocab_size": 80}
    section = {"sources": [source], "tokenizer": tokenizer, "validation_fraction": 0.1}
    recipe = Recipe.model_validate({"run_dir": tmp_path / "run", "prepare": section})
    prepare.run(recipe)
    return recipe


def contents(documents):
    return {tuple(document.tolist()) for document in documents}


def of_split(recipe, split):
    shards = TokenShards.open(recipe.data_dir, split)
    return contents(shards.read(index) for index in range(len(shards)))


def test_calibration_and_gates_share_no_document(little):
    """With so little text as here, the end of the validation split is what the gates take, too."""
    gates = load_documents(little, little.tokenizer_dir)
    found = contents(text_finder(little, little.tokenizer_dir, gates)(100))
    assert contents(gates) == of_split(little, "validation") and len(gates) < 12
    assert len(found) >= 5 and found <= of_split(little, "train") and not found & contents(gates)


def test_a_document_of_the_gates_is_passed_over_wherever_it_stands(little):
    """As with sources that name their split, which may hold the same text."""
    train = sorted(of_split(little, "train"))
    gates = [np.array(document, dtype=np.int64) for document in train[: len(train) // 2]]
    found = contents(text_finder(little, little.tokenizer_dir, gates)(100))
    assert found and found <= set(train) - contents(gates)


def test_a_foreign_vocabulary_reads_the_training_text_anew(little, model_folder):
    foreign = model_folder("bert")
    gates = load_documents(little, foreign)
    found = text_finder(little, foreign, gates)(100)
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (foreign, little.tokenizer_dir))
    lines = {theirs.decode(document) for document in found}
    assert len(lines) >= 5 and not contents(found) & contents(gates)
    assert lines <= {ours.decode(document) for document in of_split(little, "train")}


def test_without_a_recipes_text_it_is_further_files_of_the_standard_library(model_folder, tmp_path):
    folder = model_folder("bert")
    gates = stdlib_documents(folder)
    found = text_finder(Recipe(run_dir=tmp_path), folder, gates)(5000)
    assert sum(map(len, found)) >= 5000 and not contents(found) & contents(gates)


def test_too_little_text_is_refused_with_the_number(little):
    gates = load_documents(little, little.tokenizer_dir)
    find = text_finder(little, little.tokenizer_dir, gates)
    size = sum(map(len, of_split(little, "train")))
    assert sum(map(len, find(size))) == size
    with pytest.raises(
        UserError, match=rf"there are {size} tokens .* no gate takes\nNeeded: {size + 1}[\s\S]*calibration"
    ):
        find(size + 1)


def test_only_forms_that_calibrate_ask_for_text(model_folder, documents, tmp_path):
    """int8 needs none; int8_static is refused, and nothing is left behind."""

    def none(needed):
        raise UserError(f"no text, {needed}")

    folder = model_folder("bert")
    spec = read_spec(folder)
    gates = Gates(folder, spec, SETTINGS, documents, none, 0)
    needed = needed_tokens(spec, Calibration())
    with pytest.raises(UserError, match=f"no text, {needed}"):
        _ = gates.calibration
    batches = calibration_batches(lambda needed: documents, spec, Calibration())
    assert sum(batch["input_ids"].size for batch in batches) == needed


def test_the_stage_calibrates_on_training_text(little, model_folder, monkeypatch):
    """Seen in what the quantizer is given: no row of it begins a document of the validation split."""
    given = []
    monkeypatch.setattr(
        "export.variants.quantize_by_ranges", lambda raw, file, batches, settings: given.extend(batches)
    )
    foreign = model_folder("bert")
    settings = SETTINGS.model_copy(update={"variants": ("fp32", "int8_static"), "calibration": Calibration(batches=2)})
    with pytest.raises(UserError, match="model_int8_static.onnx is not there"):
        stage.export_model(little, settings, "m", foreign, load_documents(little, foreign))
    (first, _) = given
    text = AutoTokenizer.from_pretrained(foreign).decode(first["input_ids"][0])
    validation = [
        AutoTokenizer.from_pretrained(little.tokenizer_dir).decode(one) for one in of_split(little, "validation")
    ]
    assert "line" in text and not [line for line in validation if f"{line}line" in text]

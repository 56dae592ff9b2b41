"""The quality gate on labelled text: scores against other implementations, planted damage, and rows that do not fit."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

from export import export as stage
from export.gates import Gates
from export.io_spec import read_spec
from export.labelled import entities, labelled_scorer, word_f1
from export.runners import open_torch
from export.scores import Scores
from export.task_gate import check_quality, interval
from tests.export.conftest import TAGS
from trainer.chain import stage_key
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError
from trainer.export_config import Export

WORDS = ["return", "first", "second", "class", "Point", "x", "y", "def", "add", "self"]


def texts(count):
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, size=draw.integers(3, 12))) for _ in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_accuracy_is_the_share_that_the_model_gets_right(model_folder, tmp_path):
    """Labels are what the model says, of a known share of rows another; names and numbers of labels both do."""
    folder = model_folder("bert_classifier")
    tokenizer, model = (kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForSequenceClassification))
    rows = []
    for index, text in enumerate(texts(40)):
        with torch.inference_mode():
            label = int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())
        label = (label + 1) % 3 if index % 4 == 0 else label
        rows.append({"text": text, "label": label if index % 2 else f"LABEL_{label}"})
    scorer = labelled_scorer(folder, read_spec(folder), write(tmp_path / "rows.jsonl", rows), 256)
    scores = scorer(open_torch(folder, 1))
    assert (scores.metric, scores.value, len(scores.sums_R)) == ("accuracy", 0.75, 40)
    few = labelled_scorer(folder, read_spec(folder), tmp_path / "rows.jsonl", 10)(open_torch(folder, 1))
    assert len(few.sums_R) == 10 and few.value == 0.0  # every fourth row, evenly over the file


def test_entities_are_those_of_iob2():
    assert entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER"]) == {
        ("PER", 0, 1), ("LOC", 3, 3), ("LOC", 4, 4), ("PER", 5, 5),
    }  # fmt: skip
    assert entities(["PER", "PER", "O", "PER"]) == {("PER", 0, 1), ("PER", 3, 3)}


def test_f1_of_entities_counts_whole_ones(model_folder, tmp_path):
    """Against the definition: 2 hits / (said + true), a word's label that of its first token, padding left out."""
    folder = model_folder("roberta_tokens")
    tokenizer, runner, spec = AutoTokenizer.from_pretrained(folder), open_torch(folder, 1), read_spec(folder)
    draw = np.random.default_rng(1)
    rows, said = [], []
    for text in texts(12):
        words = text.split()
        encoding = tokenizer(words, is_split_into_words=True)
        ids = np.array(encoding["input_ids"])
        tags_T = runner.run(spec.pad([ids], len(ids)))["logits"][0].argmax(axis=1)
        places = [encoding.word_ids().index(word) for word in range(len(words))]
        said.append([TAGS[tags_T[place]] for place in places])
        true = [tag if draw.random() < 0.7 else "O" for tag in said[-1]]
        rows.append({"tokens": words, "labels": true})
    scores = labelled_scorer(folder, spec, write(tmp_path / "rows.jsonl", rows), 256)(runner)
    pairs = [(entities(theirs), entities(row["labels"])) for theirs, row in zip(said, rows, strict=True)]
    hits, total = sum(len(a & b) for a, b in pairs), sum(len(a) + len(b) for a, b in pairs)
    assert 0 < scores.value < 1 and scores.value == pytest.approx(2 * hits / total)


def test_f1_of_answers_is_that_of_the_likeliest_span(model_folder, tmp_path):
    """Each context's likeliest span, as torch alone says it, is the answer: F1 1; half of its words: F1 below."""
    folder = model_folder("bert_answers")
    tokenizer, model = (kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForQuestionAnswering))
    whole, worse = [], []
    for question, context in pairwise(texts(9)):
        batch = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
        offsets = batch.pop("offset_mapping")[0].tolist()
        with torch.inference_mode():
            output = model(**batch)
        places = [place for place, number in enumerate(batch.sequence_ids(0)) if number == 1]
        spans = [(a, b) for a in places for b in places if a <= b < a + 30]
        first, last = max(spans, key=lambda s: float(output.start_logits[0, s[0]] + output.end_logits[0, s[1]]))
        answer = context[offsets[first][0] : offsets[last][1]]
        whole.append({"question": question, "context": context, "answers": ["nothing", answer]})
        worse.append(whole[-1] | {"answers": [answer + " zzz"]})
    spec, runner = read_spec(folder), open_torch(folder, 1)
    assert labelled_scorer(folder, spec, write(tmp_path / "a.jsonl", whole), 256)(runner).value == 1.0
    assert 0.0 < labelled_scorer(folder, spec, write(tmp_path / "b.jsonl", worse), 256)(runner).value < 1.0
    assert word_f1("The cat, sat", "cat sat down") == pytest.approx(2 * 2 / 5) and word_f1("the", "a") == 1.0


def test_each_models_own_targets_count_in_the_interval():
    """F1 of a form that says more entities, most of them wrong, over a source that says few."""
    rows = 400
    source = Scores("entity_f1", np.full(rows, 2.0), np.full(rows, 2))
    chatty = Scores("entity_f1", np.full(rows, 2.0), np.full(rows, 4))
    assert interval(source, chatty) == pytest.approx((0.5, 0.5))
    with pytest.raises(GateFailed, match="entity_f1 0.5 against 1, 50.00%"):
        check_quality("m", source, chatty, 0.99)


@pytest.fixture
def graded(model_folder, tmp_path):
    """A classifier, rows that it gets right, and the settings of a gate on them alone."""
    folder = model_folder("bert_classifier")
    tokenizer, model = (kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForSequenceClassification))
    rows = []
    for text in texts(32):
        with torch.inference_mode():
            rows.append({"text": text, "label": int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())})
    path = write(tmp_path / "rows.jsonl", rows)
    loose = {"relative_rms": 100.0}
    section = {"models": {"m": str(folder)}, "variants": ["fp32"], "parity": {"fp32": loose, "shapes": [[3, 9]]}}
    return folder, path, section | {"quality": {"labelled": str(path)}}


def test_a_form_that_lost_accuracy_fails(graded, documents, tmp_path):
    """The classifier's rows are turned: its logits are as large as before, its answers are others."""
    folder, _, section = graded
    spoilt = tmp_path / "spoilt"
    shutil.copytree(folder, spoilt)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight.roll(1, dims=0))
        model.classifier.bias.copy_(model.classifier.bias.roll(1))
    model.save_pretrained(spoilt)
    gates = Gates(folder, read_spec(folder), Export.model_validate(section), documents, lambda needed: documents, 0)
    assert gates.task.quality.value == 1.0
    assert (
        check_quality("m", gates.task.quality, gates.task.score(open_torch(folder, 1)), 0.99)["metrics"]["kept"] == 1.0
    )
    with pytest.raises(GateFailed, match=r"accuracy 0.* against 1, .*% \(.*\) of its source's quality is kept"):
        check_quality("m", gates.task.quality, gates.task.score(open_torch(spoilt, 1)), 0.99)


def test_rows_that_do_not_fit_are_named(graded, tmp_path):
    folder, path, _ = graded
    good = {"text": "x", "label": 0}
    cases = [
        ("", "rows.jsonl is empty"),
        (json.dumps(good) + "\nno json", r"rows.jsonl:2: no json\nNeeded: an object with text \(text\), label \(text"),
        (json.dumps({"sentence": "x", "label": 0}), r"rows.jsonl:1: .*sentence"),
        (json.dumps(good | {"label": "happy"}), r"labels happy\nNeeded: the model's: LABEL_0, LABEL_1, LABEL_2"),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            labelled_scorer(folder, read_spec(folder), path, 256)
    path.unlink()
    with pytest.raises(UserError, match="rows.jsonl is not there"):
        labelled_scorer(folder, read_spec(folder), path, 256)


def test_the_stage_gates_on_them_and_says_where_nothing_does(graded, model_folder, capsys, tmp_path):
    folder, path, section = graded
    recipe = Recipe.model_validate({"run_dir": tmp_path / "run", "export": section})
    before = stage_key(recipe, "export")
    stage.run(recipe)
    assert "accuracy 1, 100.00% of the source's quality" in capsys.readouterr().out
    path.write_text(path.read_text().replace("return", "Point", 1))
    assert stage_key(recipe, "export")["inputs"] != before["inputs"]  # other rows, and the stage runs again
    specs = {
        "m": read_spec(folder),
        "f": read_spec(model_folder("bert_features")),
        "l": read_spec(model_folder("bert")),
    }
    stage.check_quality_gates(Export.model_validate(section | {"quality": {}}), specs)
    said = capsys.readouterr().out
    assert "m: export.quality.labelled is not given: a form of a classification model is held by parity" in said
    assert "f: nothing measures it: a form of a feature_extraction model" in said and "l: " not in said
    wrong = section | {"models": {"m": str(model_folder("bert"))}}
    with pytest.raises(UserError, match="labelled is given, and the models are of masked_lm"):
        stage.run(Recipe.model_validate({"run_dir": tmp_path / "run", "export": wrong}))

"""What the packed Python models answer, called as Triton's backend calls them, against transformers' pipelines."""

import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)
from transformers.pipelines.document_question_answering import select_starts_ends

from tests.export.conftest import MAX_LENGTH

TEXTS = [
    "return first",
    "class Point:\n    x = 0\n    y = 1",
    "def add(first, second):\n    return first + a b c d e f",
    "ünïcode ☃ [UNK] second [MASK] return",
]


@dataclass
class Tensor:
    name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass
class InferenceResponse:
    tensors: list[Tensor] = field(default_factory=list)
    error: str | None = None


@pytest.fixture
def backend(monkeypatch):
    """What the server gives its Python models to work with; a request is a mapping of arrays."""
    module = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.TritonError = Tensor, InferenceResponse, str
    module.get_input_tensor_by_name = lambda request, name: Tensor(name, request[name])
    monkeypatch.setitem(sys.modules, module.__name__, module)


def call(folder: Path, request: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A Python model's answer to one request; RuntimeError where it refuses."""
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    if hasattr(model, "initialize"):
        model.initialize({"model_repository": str(folder), "model_version": "1"})
    (response,) = model.execute([request])
    if response.error:
        raise RuntimeError(response.error)
    return {tensor.name: tensor.array for tensor in response.tensors}


def ask(packed: Path, name: str, **texts: list[str]) -> dict[str, np.ndarray]:
    """All tensors after the three models of a packed folder, as its ensemble hands them on."""
    models = packed / name / "models"
    tensors = {key: np.array([[text.encode()] for text in column], dtype=object) for key, column in texts.items()}
    tensors |= call(models / f"{name}_tokenize", tensors)
    session = onnxruntime.InferenceSession(models / name / "1" / "model.onnx")
    names = [port.name for port in session.get_outputs()]
    outputs = session.run(names, {port.name: tensors[port.name] for port in session.get_inputs()})
    tensors |= dict(zip(names, outputs, strict=True))
    return call(models / f"{name}_answer", tensors)


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert [{**one, "score": 0} for one in found] == [{**one, "score": 0} for one in expected]
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-5)


def test_entities_are_those_of_the_pipeline(packed, model_folder, backend):
    """In one request of unequal texts; the labels have B- and I-, and some texts unknown and special tokens."""
    folder = model_folder("roberta_tokens")
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    classify = pipeline("token-classification", model, tokenizer=tokenizer, aggregation_strategy="simple")
    answers = [json.loads(one) for one in ask(packed, "roberta_tokens", TEXT=TEXTS)["ANSWER"][:, 0]]
    groups = 0
    for text, answer in zip(TEXTS, answers, strict=True):
        expected = classify(text)
        assert_same(answer, expected)
        groups += sum(one["end"] - one["start"] > 1 for one in expected)
    assert groups > 3 and {one["entity_group"] for answer in answers for one in answer} == {"PER", "LOC"}


def best_answers(folder: Path, question: str, context: str, wanted: int) -> list[dict]:
    """What transformers' pipeline gave until version 4, by what is left of it in 5: its search for the best spans."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(question, context, return_tensors="pt")
    with torch.inference_mode():
        output = AutoModelForQuestionAnswering.from_pretrained(folder)(**batch)
    is_class = (batch["input_ids"] == tokenizer.cls_token_id).numpy()
    outside = np.array([[number != 1 for number in batch.sequence_ids(0)]]) & ~is_class
    found = select_starts_ends(
        output.start_logits.numpy(),
        output.end_logits.numpy(),
        outside,
        batch["attention_mask"].numpy(),
        top_k=2 * wanted + 10,
    )
    answers: dict[str, dict] = {}
    for first, last, score in zip(*found[:3], strict=True):
        start = batch.word_to_chars(0, batch.token_to_word(0, first), sequence_index=1).start
        end = batch.word_to_chars(0, batch.token_to_word(0, last), sequence_index=1).end
        text = context[start:end]
        answers.setdefault(text.lower(), {"score": 0.0, "start": start, "end": end, "answer": text})
        answers[text.lower()]["score"] += float(score)
    return sorted(answers.values(), key=lambda one: one["score"], reverse=True)[:wanted]


def test_answers_are_the_best_spans(packed, model_folder, backend):
    """Pairs of unequal length in one request; token types tell a BERT which of its texts is which."""
    questions = ["what is second?", "where", "return first + second, or what else"]
    contexts = [text + " first first" for text in TEXTS[1:]]
    found = ask(packed, "bert_answers", QUESTION=questions, CONTEXT=contexts)["ANSWER"][:, 0]
    for question, context, answer in zip(questions, contexts, found, strict=True):
        expected = best_answers(model_folder("bert_answers"), question, context, wanted=3)
        assert_same(json.loads(answer), expected)
        assert len(expected) == 3 and all(context[one["start"] : one["end"]] == one["answer"] for one in expected)


def test_features_are_those_of_the_pipeline(packed, model_folder, backend):
    folder = model_folder("bert_features")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    extract = pipeline("feature-extraction", AutoModel.from_pretrained(folder), tokenizer=tokenizer)
    found = ask(packed, "bert_features", TEXT=TEXTS)
    assert found["FEATURES"].dtype == found["EMBEDDING"].dtype == np.float32
    for text, features_TH, embedding_H in zip(TEXTS, found["FEATURES"], found["EMBEDDING"], strict=True):
        expected_TH = np.array(extract(text)[0])
        assert features_TH[: len(expected_TH)] == pytest.approx(expected_TH, abs=1e-4)
        assert not features_TH[len(expected_TH) :].any()
        assert embedding_H == pytest.approx(expected_TH.mean(axis=0), abs=1e-4)


def test_a_pair_that_is_too_long_is_refused(packed, backend):
    with pytest.raises(RuntimeError, match=rf"a text has \d+ tokens; the model takes {MAX_LENGTH}"):
        ask(packed, "bert_answers", QUESTION=["x " * 40], CONTEXT=["y " * 40])

"""Heads of encoders: every pair of the two that may be exported is, and its graph answers in that head's shapes."""

import numpy as np
import onnx
import pytest

from export.export import export_model
from export.io_spec import TASKS, read_spec
from export.runners import open_runner
from export.verified import examine
from tests.export.conftest import GATES, HEADS, MAX_LENGTH
from trainer.artifact import read_artifact
from trainer.config import Recipe
from trainer.export_config import Export

QUICK = ("DistilBertForQuestionAnswering", "ModernBertForTokenClassification")
# Of a single token the score of an answer's start is one number, of random weights near 0, and int8 is far off there.
SETTINGS = Export.model_validate(GATES | {"parity": GATES["parity"] | {"int8": {"relative_rms": 0.5, "min_top1": 0.0}}})
LENGTHS = (5, 1, 2, 5, 3, 4, 1)
# Of that batch, with three labels, in a model 32 wide.
SHAPES = {
    "classification": {"logits": (7, 3)},
    "token_classification": {"logits": (7, 5, 3)},
    "question_answering": {"start_logits": (7, 5), "end_logits": (7, 5)},
    "feature_extraction": {"last_hidden_state": (7, 5, 32)},
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HEADS]
)
def test_every_head_is_exported_with_its_own_outputs(name, model_folder, documents, tmp_path):
    """Those that no other test exports, in fp32 and int8."""
    spec = read_spec(model_folder(name))
    folder = export_model(Recipe(run_dir=tmp_path), SETTINGS, name, model_folder(name), documents)
    record = read_artifact(folder, "onnx")
    assert (record["about"]["architecture"], record["about"]["task"]) == (name, TASKS[name])
    assert list(examine(name, folder, model_folder(name)).variants) == ["fp32", "int8"]
    for proof in record["evidence"]:
        assert {"1x1", "3x9", f"1x{MAX_LENGTH}"} <= {case["case"] for case in proof["cases"]}
    rows = [np.arange(5, 5 + length) for length in LENGTHS]
    for form in ("fp32", "int8"):
        declared = onnx.load(folder / spec.file(form)).graph.output
        axes = [tuple(dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim) for one in declared]
        named = zip((one.name for one in declared), axes, strict=True)
        assert list(named) == [(port.name, port.axes) for port in spec.outputs]
        made = open_runner(folder, f"onnx_{form}", 1).run(spec.pad(rows, max(LENGTHS)))
        assert {output: value.shape for output, value in made.items()} == SHAPES[spec.task]

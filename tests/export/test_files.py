"""Graphs whose weights lie in a file beside them: every form, its evidence, and data that is not the graph's own."""

import shutil

import numpy as np
import onnx
import pytest

from export import bench, files
from export import export as stage
from export.bench import Subject
from export.io_spec import read_spec
from export.runners import open_onnx
from tests.export.test_export import EVERY, SETTINGS
from trainer.artifact import read_artifact
from trainer.config import Recipe
from trainer.errors import UserError


@pytest.fixture(scope="module")
def large(model_folder, documents, tmp_path_factory):
    """A tiny GPT-2 exported as if one file could hold 10 kB."""
    settings = SETTINGS.model_copy(update={"variants": (*EVERY, "int4")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "LARGE_BYTES", 10_000)
        root = tmp_path_factory.mktemp("large")
        return stage.export_model(Recipe(run_dir=root), settings, "m", model_folder("gpt2"), documents)


def subject(folder, model):
    return Subject("m", model, folder, read_spec(model), folder, 0, 0)


def test_every_form_has_its_weights_beside_it(large, model_folder):
    found = {file.name for file in large.glob("*.onnx_data")}
    assert found == {f"{proof['file']}_data" for proof in read_artifact(large)["evidence"]} and len(found) == 6
    for proof in read_artifact(large)["evidence"]:
        file = large / proof["file"]
        assert files.is_the_one(proof, file)
        assert files.data_file(file).stat().st_size > 40_000
        assert files.size_mib(file) * 2**20 == file.stat().st_size + files.data_file(file).stat().st_size
        onnx.checker.check_model(str(file), full_check=proof["file"] != "model_q4.onnx")
    assert bench.refusal(subject(large, model_folder("gpt2")), "onnx_fp32") == ""


def test_other_data_is_not_what_passed(large, model_folder, tmp_path):
    """The graph's own file is the same to the byte; the weights beside it are not."""
    copy = tmp_path / "m"
    shutil.copytree(large, copy)
    data = files.data_file(copy / "model.onnx")
    changed = bytearray(data.read_bytes())
    changed[100] ^= 1
    data.write_bytes(changed)
    assert "not the file that passed parity" in bench.refusal(subject(copy, model_folder("gpt2")), "onnx_fp32")
    assert bench.refusal(subject(copy, model_folder("gpt2")), "onnx_int8") == ""


@pytest.mark.parametrize("where", ["../outside", "/etc/hostname"])
def test_data_outside_the_folder_is_refused(large, where, tmp_path):
    """A graph may name any file: one that is not in its folder is not read."""
    copy = tmp_path / "m"
    shutil.copytree(large, copy)
    shutil.copyfile(files.data_file(copy / "model.onnx"), tmp_path / "outside")
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = where
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"model.onnx does not open on CPUExecutionProvider"):
        open_onnx(copy / "model.onnx", 1)


def test_a_small_graph_is_one_file(raw_graph):
    assert not files.data_file(raw_graph("gpt2")).exists()
    assert np.isclose(files.size_mib(raw_graph("gpt2")) * 2**20, raw_graph("gpt2").stat().st_size)

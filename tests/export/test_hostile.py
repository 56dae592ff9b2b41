"""Files made to do harm: each is refused before anything opens it, with the reason; honest ones are let through."""

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from export import verify
from export.export import copy_companions, export_model
from export.hostile import check_folder, check_graph, data_files
from export.verified import examine
from tests.export.conftest import GATES
from trainer.artifact import hash_file, hash_tree, read_artifact, write_json
from trainer.config import Recipe
from trainer.errors import UserError
from trainer.export_config import Export


def graph(*nodes, constants=()) -> onnx.ModelProto:
    """y = x @ w, with other nodes and constants beside it."""
    weight = numpy_helper.from_array(np.ones((4, 4), dtype=np.float32), "w")
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    made = helper.make_graph([product, *nodes], "g", ports[:1], ports[1:], [weight, *constants])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    """The model as bytes, unchecked: onnx.save would load external data first."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def with_external(folder: Path, **where) -> Path:
    """The graph with its weight in another file, described as `where` says."""
    model = graph()
    weight = model.graph.initializer[0]
    (folder / "model.onnx_data").write_bytes(weight.raw_data)
    external_data_helper.set_external_data(weight, **({"location": "model.onnx_data"} | where))
    weight.ClearField("raw_data")
    return saved(model, folder)


@pytest.mark.parametrize("name", ["bert", "gpt2", "modernbert"])
def test_real_graphs_are_let_through(name, raw_graph, tmp_path):
    check_graph(raw_graph(name))
    assert data_files(raw_graph(name)) == []
    outside = tmp_path / "model.onnx"
    onnx.save(
        onnx.load(raw_graph(name)), outside, save_as_external_data=True, location="model.onnx_data", size_threshold=0
    )
    check_graph(outside)
    assert data_files(outside) == [tmp_path / "model.onnx_data"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"location": "/etc/passwd"}, "the data of w is in '/etc/passwd'"),
        ({"location": "../secret"}, r"the data of w is in '\.\./secret'"),
        ({"location": "sub/../../secret"}, "a file in the same folder"),
        ({"location": ".."}, "a file in the same folder"),
        ({"location": "a\\..\\b"}, "a file in the same folder"),
        ({"location": "nowhere"}, "nowhere is no plain file"),
        ({"offset": 8}, "w wants 64 bytes, 64 at 8 of model.onnx_data, which has 64"),
        ({"offset": 0, "length": 2**40}, f"w wants 64 bytes, {2**40} at 0"),
        ({"offset": 0, "length": 32}, "w wants 64 bytes, 32 at 0"),
    ],
)
def test_external_data_stays_in_the_folder_and_has_its_size(where, message, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(64))
    (tmp_path / "inner").mkdir()
    with pytest.raises(UserError, match=message):
        check_graph(with_external(tmp_path / "inner", **where))


def test_external_data_at_no_number_is_refused(tmp_path):
    path = with_external(tmp_path, offset=0)
    model = onnx.load(path, load_external_data=False)
    next(entry for entry in model.graph.initializer[0].external_data if entry.key == "offset").value = "abc"
    with pytest.raises(UserError, match="w wants 64 bytes, 64 at -1"):
        check_graph(saved(model, tmp_path))


def test_external_data_may_be_no_symlink_or_pipe(tmp_path):
    path = with_external(tmp_path)
    check_graph(path)
    data = tmp_path / "model.onnx_data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="model.onnx_data is no plain file"):
        check_graph(path)
    data.unlink()
    os.mkfifo(data)  # opening it would wait for ever
    with pytest.raises(UserError, match="model.onnx_data is no plain file"):
        check_graph(path)


def test_data_hidden_in_a_node_is_found(tmp_path):
    """A constant inside a branch of an If."""
    hidden = numpy_helper.from_array(np.ones(4, dtype=np.float32), "hidden")
    external_data_helper.set_external_data(hidden, location="/etc/shadow")
    hidden.ClearField("raw_data")
    constant = helper.make_node("Constant", [], ["c"], value=hidden)
    out = helper.make_tensor_value_info("c", TensorProto.FLOAT, [4])
    branch = helper.make_graph([constant], "branch", [], [out])
    condition = numpy_helper.from_array(np.array(True), "always")
    choice = helper.make_node("If", ["always"], ["z"], then_branch=branch, else_branch=branch)
    with pytest.raises(UserError, match="the data of hidden is in '/etc/shadow'"):
        check_graph(saved(graph(choice, constants=[condition]), tmp_path))


def resized(*dims) -> onnx.ModelProto:
    model = graph()
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(dims)
    return model


def asked(kind: str, shape: list[int]) -> onnx.ModelProto:
    inputs = ["shape"] if kind == "ConstantOfShape" else ["x", "shape"]
    node = helper.make_node(kind, inputs, ["z"])
    return graph(node, constants=[numpy_helper.from_array(np.array(shape, dtype=np.int64), "shape")])


def in_a_branch(shape: list[int]) -> onnx.ModelProto:
    """Filled within an If, by a shape of another kind of constant outside it."""
    outside = helper.make_node("Constant", [], ["shape"], value_ints=shape)
    filled = helper.make_node("ConstantOfShape", ["shape"], ["c"])
    branch = helper.make_graph([filled], "branch", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, None)])
    choice = helper.make_node("If", ["always"], ["z"], then_branch=branch, else_branch=branch)
    return graph(outside, choice, constants=[numpy_helper.from_array(np.array(True), "always")])


def with_function() -> onnx.ModelProto:
    model = graph()
    inner = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("own", "Twice", ["a"], ["b"], [inner], [helper.make_opsetid("", 20)]))
    return model


def wide_input() -> onnx.ModelProto:
    model = graph()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2**40
    return model


def no_bytes() -> onnx.ModelProto:
    model = resized(2**20, 2**20)
    model.graph.initializer[0].ClearField("raw_data")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resized(2**40, 4), r"w has shape \[1099511627776, 4\]"),
        (lambda: resized(-1, 4), r"w has shape \[-1, 4\]"),
        (lambda: resized(2**20, 2**20), r"w of shape \[1048576, 1048576\] has 64 bytes\nNeeded: 4398046511104 bytes"),
        (no_bytes, r"w of shape \[1048576, 1048576\] has 0 bytes"),
        (lambda: asked("ConstantOfShape", [2**20, 2**20]), "ConstantOfShape .* makes a tensor of shape"),
        (lambda: asked("Expand", [2**30, 4]), "Expand .* makes a tensor of shape"),
        (lambda: asked("Tile", [2**31, 4]), "Tile .* makes a tensor of shape"),
        (lambda: in_a_branch([2**40]), "ConstantOfShape .* makes a tensor of shape"),
        (with_function, "has functions of its own: Twice"),
        (wide_input, r"x has shape \[0, 1099511627776\]"),
    ],
)
def test_absurd_shapes_are_refused(make, message, tmp_path):
    with pytest.raises(UserError, match=message):
        check_graph(saved(make(), tmp_path))
    check_graph(saved(asked("ConstantOfShape", [1024, 1024]), tmp_path))


def test_what_is_no_graph_is_refused(tmp_path, raw_graph):
    whole = raw_graph("bert").read_bytes()
    path = tmp_path / "model.onnx"
    for content in (whole[: len(whole) // 2], b"", b"\x80\x04K\x01.", b"#!/bin/sh\nrm -rf /\n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as ONNX|holds no graph"):
            check_graph(path)
    path.unlink()
    path.symlink_to(raw_graph("bert"))
    with pytest.raises(UserError, match="no plain file"):
        check_graph(path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "training_args.bin", "model.pt", "a.pkl", "scaler.joblib", "x.npy"]
)
def test_folders_with_pickles_are_refused(name, tmp_path):
    (tmp_path / "deep").mkdir()
    check_folder(tmp_path)
    (tmp_path / "deep" / name).write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UserError, match=f"{name} can hold a pickle"):
        check_folder(tmp_path)


def test_folders_with_links_or_pipes_are_refused(tmp_path):
    (tmp_path / "config.json").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="config.json is a symlink to /etc/passwd"):
        check_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "sub").symlink_to(tmp_path.parent, target_is_directory=True)
    with pytest.raises(UserError, match="sub is a symlink"):
        check_folder(tmp_path)
    (tmp_path / "sub").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is no plain file"):
        check_folder(tmp_path)


def test_no_file_of_this_machine_is_copied_into_an_export(model_folder, documents, tmp_path):
    """A model's folder may hold links within itself, as the hub's cache does, and none to elsewhere."""
    revision, blobs = tmp_path / "models--m" / "snapshots" / "abc", tmp_path / "models--m" / "blobs"
    shutil.copytree(model_folder("bert"), revision)
    blobs.mkdir()
    for number, file in enumerate(list(revision.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("../../blobs", str(number)))
    (tmp_path / "out").mkdir()
    copy_companions(revision, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "out" / "config.json").is_symlink()
    (tmp_path / "secret").write_text("secret")
    (revision / "notes.txt").symlink_to(tmp_path / "secret")
    settings = Export.model_validate(GATES | {"variants": ["fp32"]})
    with pytest.raises(UserError, match=r"notes.txt is a link to .*secret\nNeeded: files of the model's own folder"):
        export_model(Recipe(run_dir=tmp_path), settings, "m", revision, documents)
    assert not (tmp_path / "export" / "m").exists()


def test_a_hostile_export_is_not_verified(exported_folder, model_folder, tmp_path):
    folder = tmp_path / "export" / "m"
    shutil.copytree(exported_folder("bert"), folder)
    with_external(folder, location="../secret").rename(folder / "model.onnx")
    recipe = Recipe.model_validate({"run_dir": tmp_path, "export": GATES | {"models": {"m": model_folder("bert")}}})
    with pytest.raises(UserError, match=r"the data of w is in '\.\./secret'"):
        verify.run(recipe, "export")


def test_a_hostile_export_is_not_packed_or_built_from(exported_folder, tmp_path):
    """Its record fits its bytes, so that only the look into the graph finds it."""
    folder = tmp_path / "bert"
    shutil.copytree(exported_folder("bert"), folder)
    with_external(folder, location="../secret").rename(folder / "model.onnx")
    (folder / "model.onnx_data").unlink()
    record = read_artifact(folder)
    record["evidence"][0]["sha256"] = hash_file(folder / "model.onnx")
    write_json(folder / "artifact.json", record | {"content_sha256": hash_tree(folder)})
    with pytest.raises(UserError, match=r"the data of w is in '\.\./secret'"):
        examine("bert", folder, Path("nowhere"))

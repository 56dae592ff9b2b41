"""Engines that were built for another place: built anew by TensorRT-RTX, or refused with both reasons."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from export.audit import audit, read_layers
from export.engine_files import Place, check_place, manifest_of, plan_name, read_manifest, write_manifest
from export.io_spec import read_spec
from export.rebuild import fitting_plan
from export.to_tensorrt import Builder, engine_shapes, products
from trainer.errors import UserError
from trainer.serving_config import Profile, TensorRT

SETTINGS = TensorRT(
    library="tensorrt_rtx",
    profiles=(Profile(batch_size=(1, 2, 4), sequence_length=(1, 16, 32)),),
)
THERE = Place("tensorrt_rtx", "1.6.1.0", "8.0", "NVIDIA A100", "550.0")
HERE = replace(THERE, library_version="1.7.1.116", compute_capability="8.9", gpu="NVIDIA L40S")


@pytest.fixture
def plan(tmp_path, raw_graph, model_folder) -> Path:
    """An engine folder of another place, with the graph beside it; what is in the plan matters to nobody here."""
    folder = tmp_path / "engines" / "bert"
    folder.mkdir(parents=True)
    graph, path = folder / "model.onnx", folder / plan_name("fp32", "8.0")
    shutil.copyfile(raw_graph("bert"), graph)
    path.write_bytes(b"an engine" * 100)
    about = {
        "variant": "fp32",
        "profiles": engine_shapes(read_spec(model_folder("bert")), SETTINGS),
        "tf32": False,
        "version_compatible": False,
        "hardware_compatibility": "none",
        "audit": {"wider_share": 0.0},
    }
    write_manifest(path, THERE, graph, about)
    return path


def test_an_engine_that_fits_is_itself(plan):
    assert fitting_plan(plan, here=THERE) == plan
    assert [path.name for path in plan.parents[1].iterdir()] == ["bert"]


def test_one_of_another_place_is_built_anew(plan, capsys):
    """Once: the next call finds it. The engine is read back as the library tells it, and its shapes are the first's."""
    library = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install '.[rtx]'")
    here = replace(HERE, library_version=library.__version__)
    made = fitting_plan(plan, here=here)
    said = capsys.readouterr().err
    assert "for compute capability 8.0, this GPU (NVIDIA L40S) has 8.9" in said and "was built by" in said
    manifest, before = read_manifest(made), read_manifest(plan)
    check_place(made, manifest, here, plan.parent / "model.onnx")
    assert manifest["profiles"] == before["profiles"] and manifest["onnx"] == before["onnx"]
    assert manifest["in_place_of"] == before["plan"] and manifest["audit"]["types"] == {"fp32": 14}
    builder, graph = Builder("tensorrt_rtx"), plan.parent / "model.onnx"
    direct, description = builder.build_shapes(graph, before["profiles"], SETTINGS, "8.9")
    assert abs(made.stat().st_size - len(direct)) < 0.02 * len(direct)
    assert audit("bert", "fp32", read_layers(description), products(graph), 0.0) == manifest["audit"]
    stamp = made.stat().st_mtime_ns
    assert fitting_plan(plan, here=here) == made and made.stat().st_mtime_ns == stamp
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"compute_capability": None, "gpu": None}, "here is no GPU to build for"),
        ({"library": "tensorrt", "library_version": "10.13.0"}, "it is to be built by tensorrt_rtx"),
    ],
)
def test_where_none_can_be_built_both_reasons_are_told(plan, change, reason):
    with pytest.raises(UserError, match=rf"sm80.plan cannot run here: .*; and none is built in its place: {reason}"):
        fitting_plan(plan, here=replace(HERE, **change))


def test_only_the_graph_that_it_came_from_is_built(plan):
    graph = plan.parent / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"?")
    with pytest.raises(
        UserError, match=r"for compute capability 8.0.*model.onnx is not the file that it was built from"
    ):
        fitting_plan(plan, here=HERE)
    graph.unlink()
    with pytest.raises(UserError, match=r"none is built in its place: .*model.onnx is not there"):
        fitting_plan(plan, here=HERE)
    manifest_of(plan).write_text(json.dumps(read_manifest(plan) | {"plan": {"bytes": 900, "sha256": "0" * 64}}))
    with pytest.raises(UserError, match="is not the plan that its manifest names"):
        fitting_plan(plan, here=HERE)


def test_a_library_that_refuses_says_so_and_leaves_nothing(plan):
    library = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install '.[rtx]'")
    here = replace(HERE, library_version=library.__version__, compute_capability="9.0", gpu="NVIDIA H100")
    with pytest.raises(
        UserError, match=r"has 9.0; and none is built in its place: tensorrt_rtx .* does not build for 9"
    ):
        fitting_plan(plan, here=here)
    assert [path.name for path in plan.parents[1].iterdir()] == ["bert"]

"""A loader that mends: an engine that was built for another place is built anew from the ONNX file that it came from.
Building is `to_tensorrt`'s, running `tensorrt_runner`'s; an engine of other bytes than its manifest's is not mended.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from export.audit import audit, read_layers
from export.engine_files import Place, check_place, manifest_of, plan_name, read_manifest, write_manifest
from export.files import is_the_one
from export.io_spec import IoSpec
from export.tensorrt_library import load_library, this_place
from export.tensorrt_runner import TensorRTRunner, open_engine
from export.to_tensorrt import Builder, products
from trainer.artifact import staging
from trainer.errors import UserError
from trainer.serving_config import TensorRT

# What of a manifest an engine keeps wherever it is built.
_KEPT = ("variant", "stem", "profiles", "tf32", "version_compatible", "hardware_compatibility")


def open_fitting(plan: Path, spec: IoSpec, onnx: Path | None = None, cuda_graphs: bool = False) -> TensorRTRunner:
    """A runner for a plan or, where another library's version or another GPU is here, for one built in its place.

    `onnx` is the graph file that the plan was built from; by default the one beside it. UserError as `fitting_plan`.
    """
    return open_engine(fitting_plan(plan, onnx), spec, onnx, cuda_graphs)


def fitting_plan(plan: Path, onnx: Path | None = None, here: Place | None = None) -> Path:
    """The plan itself where it runs here, else the one that stands for it, which is built if it is not there yet.

    UserError with why the plan does not run here, and why none can be built in its place: no GPU to build for, no ONNX
    file of the bytes that the manifest names, or a library that is missing or refuses.
    """
    manifest = read_manifest(plan)
    here = here or this_place(manifest["library"], load_library(manifest["library"]))
    reason = _misfit(plan, manifest, here)
    if not reason:
        return plan
    graph = onnx or plan.parent / manifest["onnx"]["file"]
    try:
        return _stand_in(plan, manifest, graph, here, reason)
    except UserError as problem:  # a failed audit is one too
        found = str(problem).split("\n")[0]
        raise UserError(
            f"{reason}; and none is built in its place: {found}",
            "an engine built for this place",
            "lmworks tensorrt RECIPE",
        ) from None


def _misfit(plan: Path, manifest: Mapping[str, Any], here: Place) -> str:
    """Why a plan does not run here, or nothing."""
    try:
        check_place(plan, manifest, here)
    except UserError as problem:
        return str(problem).split("\n")[0]
    return ""


def _stand_in(plan: Path, manifest: Mapping[str, Any], graph: Path, here: Place, reason: str) -> Path:
    """The plan that was built for this place from `graph`, which must be the file that the manifest names."""
    if here.compute_capability is None:
        raise UserError("here is no GPU to build for")
    if here.library != manifest["library"]:
        raise UserError(f"it is to be built by {manifest['library']}")
    if not graph.is_file():
        raise UserError(f"{graph} is not there")
    if not is_the_one(manifest["onnx"], graph):
        raise UserError(f"{graph} is not the file that it was built from")
    folder = plan.parent.with_name(f"{plan.parent.name}.rebuilt") / f"sm{here.compute_capability.replace('.', '')}"
    name = plan_name(manifest["variant"], here.compute_capability, manifest.get("stem", "model"))
    made = folder / manifest["variant"] / name
    if made.is_file() and manifest_of(made).is_file():
        before = read_manifest(made)
        if before["onnx"] == manifest["onnx"] and not _misfit(made, before, here):
            return made
    _build(manifest, graph, made, here)
    Console(stderr=True, highlight=False).print(
        f"{reason}: {made} was built in its place; its layers have been read back, its numbers not been compared",
        soft_wrap=True,
    )
    return made


def _build(manifest: Mapping[str, Any], graph: Path, made: Path, here: Place) -> None:
    """Write the engine with its manifest, whole or not at all: same graph, profiles and options, another place."""
    assert here.compute_capability is not None
    options = {name: manifest[name] for name in ("tf32", "version_compatible", "hardware_compatibility")}
    settings = TensorRT(library=manifest["library"], **options)
    builder = Builder(manifest["library"])
    plan, description = builder.build_shapes(graph, manifest["profiles"], settings, here.compute_capability)
    if not builder.ahead_of_time:
        description = builder.describe(plan)
    variant = manifest["variant"]
    what = f"{variant} for {here.compute_capability}"
    audited = audit(what, variant, read_layers(description), products(graph), manifest["audit"]["wider_share"])
    with staging(made.parent) as partial:
        (partial / made.name).write_bytes(plan)
        about = {name: manifest[name] for name in _KEPT if name in manifest} | {
            "audit": audited,
            "in_place_of": manifest["plan"],
        }
        write_manifest(partial / made.name, here, graph, about)

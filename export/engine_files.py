"""An engine's files: the plan, and beside it a manifest that says where it runs and what it was made from.
Building is `to_tensorrt`'s, running `tensorrt_runner`'s; nothing here imports TensorRT.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.files import hashes, is_the_one
from trainer.artifact import hash_file
from trainer.errors import UserError


@dataclass(frozen=True)
class Place:
    """What an engine depends on: a library and, where there is one, a GPU with its driver."""

    library: str
    library_version: str
    compute_capability: str | None
    gpu: str | None
    driver: str | None


def plan_name(variant: str, compute_capability: str, stem: str = "model") -> str:
    """File of a plan: `model_fp16_sm89.plan`."""
    return f"{stem}_{variant}_sm{compute_capability.replace('.', '')}.plan"


def manifest_of(plan: Path) -> Path:
    """The manifest beside a plan."""
    return plan.with_suffix(".json")


def write_manifest(plan: Path, place: Place, onnx: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a plan: where it was built, for which compute capability, from which bytes."""
    manifest = {
        "plan": {"file": plan.name, "sha256": hash_file(plan), "bytes": plan.stat().st_size},
        "onnx": hashes(onnx),
        **asdict(place),
        **about,
    }
    manifest_of(plan).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(plan: Path) -> dict[str, Any]:
    """The manifest of a plan that is what it says; UserError for a plan without one, or of other bytes."""
    manifest = manifest_of(plan)
    for path in (plan, manifest):
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path} is no plain file", "a plan and its manifest", "build the engine: lmworks tensorrt")
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        wanted = found["plan"]
        size, digest = int(wanted["bytes"]), str(wanted["sha256"])
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{manifest} is no manifest ({problem!r})", "the one that was built with the plan") from None
    if plan.stat().st_size != size:
        raise _other_bytes(f"{plan} has {plan.stat().st_size} bytes", f"{size}: it is cut short or another")
    if hash_file(plan) != digest:
        raise _other_bytes(f"{plan} is not the plan that its manifest names", "the same bytes")
    return found


def check_together(plans: Sequence[Path]) -> None:
    """UserError for plans of an encoder-decoder of which one's manifest names another encoder or decoder beside it."""
    for plan in plans:
        beside = {named["file"]: named["sha256"] for named in read_manifest(plan).get("beside", [])}
        for other in plans:
            if other != plan and beside.get(other.name) != hash_file(other):
                raise _other_bytes(f"{plan} was not built with this {other.name}", "two plans of one build")


def check_place(plan: Path, manifest: Mapping[str, Any], here: Place, onnx: Path | None = None) -> None:
    """UserError, with every reason, where an engine cannot run: another library, version, GPU, or an older driver.

    `onnx` is the graph that the engine should stand for; one of other bytes is a reason too.
    """
    reasons = [reason for reason in (_library(manifest, here), _gpu(manifest, here), _driver(manifest, here)) if reason]
    if onnx is not None and not is_the_one(manifest["onnx"], onnx):
        reasons.append(f"it was built from another {onnx.name}")
    if reasons:
        raise UserError(
            f"{plan} cannot run here: {'; '.join(reasons)}", "an engine built for this place", "lmworks tensorrt RECIPE"
        )


def _library(manifest: Mapping[str, Any], here: Place) -> str:
    built, found = manifest["library_version"], here.library_version
    if manifest["library"] != here.library:
        return f"it is for {manifest['library']} {built}, here is {here.library} {found}"
    newer = _numbers(found) >= _numbers(built)
    if built == found or (manifest["version_compatible"] and newer):
        return ""
    return f"it was built by {here.library} {built}, here is {found}"


def _gpu(manifest: Mapping[str, Any], here: Place) -> str:
    target, found = manifest["compute_capability"], here.compute_capability
    if found is None:
        return f"it is for compute capability {target}, here is no GPU"
    ampere_plus = manifest["hardware_compatibility"] == "ampere_plus" and _numbers(found) >= (8, 0)
    if target != found and not ampere_plus:
        return f"it is for compute capability {target}, this GPU ({here.gpu}) has {found}"
    # TensorRT tunes an engine to the very model of the GPU that builds it; TensorRT-RTX ends its work where it runs.
    tuned = manifest["library"] == "tensorrt" and manifest["hardware_compatibility"] == "none"
    if tuned and manifest["gpu"] != here.gpu:
        return f"it was built on a {manifest['gpu']}, this is a {here.gpu}"
    return ""


def _driver(manifest: Mapping[str, Any], here: Place) -> str:
    built = manifest["driver"]
    if built is None or here.driver is None or _numbers(here.driver) >= _numbers(built):
        return ""
    return f"it was built with driver {built}, here is {here.driver}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _other_bytes(found: str, needed: str) -> UserError:
    return UserError(found, needed, "build the engine again: lmworks tensorrt RECIPE")

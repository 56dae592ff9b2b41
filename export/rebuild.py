"""The loader of engines: the plan that runs here or, where another version or GPU is, one built from the same graph.
Building is `to_tensorrt`'s, comparing numbers `engine_proof`'s, running `tensorrt_runner`'s; an engine of other bytes
than its manifest's is not mended.

    python -m export.rebuild EXPORTED VARIANT FILE
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from export.audit import audit, read_layers
from export.cases import stdlib_documents
from export.engine_files import (
    Place,
    check_place,
    check_together,
    manifest_of,
    plan_name,
    read_manifest,
    write_manifest,
)
from export.engine_proof import prove_engine
from export.files import is_the_one
from export.io_spec import IoSpec, read_spec
from export.precision import open_form
from export.runners import Pair, Runner, together, usable_threads
from export.tensorrt_library import load_library, this_place
from export.tensorrt_runner import open_engine
from export.to_tensorrt import Builder, products
from trainer.artifact import add_evidence, hash_file, in_turn, read_artifact, staging, write_json
from trainer.environment import gpus, launch_command
from trainer.errors import GateFailed, UserError
from trainer.export_config import Parity, Tolerance
from trainer.serving_config import TensorRT

# What of a manifest an engine keeps wherever it is built.
_KEPT = ("variant", "profiles", "tf32", "version_compatible", "hardware_compatibility")

_BUILD_LIMIT_S = 3600.0  # assumed: another process's, of a large model


@dataclass(frozen=True)
class Origin:
    """An exported folder's graph that passed parity, for which an engine stands."""

    exported: Path
    variant: str
    spec: IoSpec
    """The graph's own face."""
    proof: dict[str, Any]
    """The evidence of its parity."""
    sources: tuple[dict[str, Any], ...]
    """That of the fp32 graphs, where there are any, or of the variant's: what the numbers of an engine are held
    against. For a decoder with an encoder, whose text it reads, both in the order of `IoSpec.parts`."""

    @property
    def graph(self) -> Path:
        return self.file(self.proof)

    def file(self, proof: dict[str, Any]) -> Path:
        """The file of which evidence speaks; UserError where it is another by now."""
        path = self.exported / proof["file"]
        if not path.is_file():
            raise UserError(f"{path} is not there")
        if not is_the_one(proof, path):
            raise UserError(f"{path} is not the file that passed parity")
        return path

    @property
    def engines(self) -> Path:
        """Where `lmworks tensorrt` puts the engines of this export."""
        return self.exported.parents[1] / "tensorrt" / self.exported.name


@dataclass(frozen=True)
class Fitting:
    """A plan that may be run here; `parity`: the evidence of its numbers, None where no GPU is here to give any."""

    plan: Path
    parity: Mapping[str, Any] | None
    instead: str = ""
    """Why it stands in another one's place, if it does."""


def open_fitting(exported: Path, variant: str, cuda_graphs: bool = False) -> Runner | Pair:
    """A runner for the engine of an exported folder's variant, of an encoder-decoder for both, each of which gave its
    graph's numbers on a GPU as this one.

    UserError where none runs here and none can be built, GateFailed for one whose numbers are others.
    """
    spec, found = read_spec(exported), fitting_plans(exported, variant)
    graphs = zip(found, spec.parts, strict=True)
    engines = [open_engine(one.plan, part, cuda_graphs=cuda_graphs) for one, part in graphs]
    return together(engines, spec, one_by_one=True)


def fitting_plans(exported: Path, variant: str, here: Place | None = None) -> list[Fitting]:
    """`fitting_plan` of every graph of a model, in the order of `IoSpec.parts`; UserError, too, for engines of an
    encoder and a decoder that were not built together."""
    origins = [origin_of(exported, variant, part) for part in read_spec(exported).parts]
    if len(origins) > 1:
        record = read_artifact(origins[0].engines, "engines")
        here = here or _here(record)
        check_together([_choose(origin, record, here) for origin in origins])
    return [fitting_plan(origin, here) for origin in origins]


def origin_of(exported: Path, variant: str, spec: IoSpec | None = None) -> Origin:
    """What an export's record says of a variant of a graph; UserError where it has none that passed parity.

    `spec`: the graph's face, of an encoder-decoder the decoder's without it.
    """
    spec = spec or read_spec(exported)
    proofs = {proof["what"]: proof for proof in read_artifact(exported, "onnx")["evidence"]}
    own = [proofs.get(f"{part.prefix}parity_{variant}") for part in spec.parts]
    found = [proof for proof in own if proof is not None]
    if len(found) < len(own):
        raise UserError(f"{exported} has no verified {variant}", "one", "add it to export.variants and export again")
    fp32 = [proofs.get(f"{part.prefix}parity_fp32") for part in spec.parts]
    sources = [source or proof for source, proof in zip(fp32, found, strict=True)]
    return Origin(exported, variant, spec, found[-1], tuple(sources))


def fitting_plan(origin: Origin, here: Place | None = None) -> Fitting:
    """The plan of this place, or the one that stands for it, which is built if it is not there yet. Where a GPU is, one
    that was not run yet is held against its graph, and what came of it is kept.

    UserError with why the plan does not run here, and why none can be built in its place: no GPU to build for, no ONNX
    file of the bytes that the manifest names, or a library that is missing or refuses. GateFailed for other numbers.
    """
    record = read_artifact(origin.engines, "engines")
    here = here or _here(record)
    plan = _choose(origin, record, here)
    manifest = read_manifest(plan)
    if any(manifest["onnx"].get(key) != origin.proof.get(key) for key in ("sha256", "data_sha256")):
        raise UserError(f"{plan} was built from another {origin.proof['file']}", "the one that passed parity",
                        "build the engine again: lmworks tensorrt RECIPE")  # fmt: skip
    reason = _misfit(plan, manifest, here)
    if not reason:
        return _proven(origin, plan, record)
    try:
        return _stand_in(plan, manifest, origin, here, reason)
    except UserError as problem:
        found, kind = str(problem).split("\n")[0], GateFailed if isinstance(problem, GateFailed) else UserError
        raise kind(
            f"{reason}; and none is built in its place: {found}",
            "an engine built for this place",
            "lmworks tensorrt RECIPE",
        ) from None


def _here(record: Mapping[str, Any]) -> Place:
    library = record["about"]["library"]
    return this_place(library, load_library(library))


def _choose(origin: Origin, record: Mapping[str, Any], here: Place) -> Path:
    """The variant's plan for the GPU that is here, or the first one, which tells how another is built."""
    # The compute capability stands behind it; int8 also begins int8_static.
    what = f"{origin.spec.prefix}audit_{origin.variant}"
    built = [entry["file"] for entry in record["evidence"] if entry["what"].rsplit("_", 1)[0] == what]
    if not built:
        raise UserError(f"{origin.engines} has no engine of {origin.variant}", "one", "add it to tensorrt.variants")
    own = plan_name(origin.variant, here.compute_capability or "", origin.spec.stem)
    return origin.engines / (own if own in built else built[0])


def _proven(origin: Origin, plan: Path, record: Mapping[str, Any]) -> Fitting:
    """A plan that runs here, with the evidence of its numbers, which is gathered now if there is none."""
    digest = hash_file(plan)
    for entry in record["evidence"]:
        if "parity_" in entry["what"] and (entry["file"], entry["sha256"]) == (plan.name, digest):
            return Fitting(plan, entry["metrics"])
    parity = _hold(origin, plan)
    if parity is not None:
        what = f"{origin.spec.prefix}parity_{origin.variant}_{read_manifest(plan)['compute_capability']}"
        entry = {"what": what, "file": plan.name, "sha256": digest, "command": launch_command(), "metrics": parity}
        add_evidence(origin.engines, entry)
    return Fitting(plan, parity)


def _hold(origin: Origin, plan: Path) -> dict[str, Any] | None:
    """What an engine differs by from its graph on the GPU that is here, under the graph's gate; None without a GPU."""
    if not gpus():
        return None
    spec = origin.spec
    tolerance = Tolerance.model_validate(origin.proof["thresholds"])
    variant = origin.sources[0]["what"].rpartition("parity_")[2]
    source = open_form([origin.file(proof) for proof in origin.sources], variant, spec, usable_threads())
    text = stdlib_documents(origin.exported)
    return prove_engine(plan.name, spec, open_engine(plan, spec), source, text, Parity(), tolerance)["metrics"]


def _misfit(plan: Path, manifest: Mapping[str, Any], here: Place) -> str:
    """Why a plan does not run here, or nothing."""
    try:
        check_place(plan, manifest, here)
    except UserError as problem:
        return str(problem).split("\n")[0]
    return ""


def _stand_in(plan: Path, manifest: Mapping[str, Any], origin: Origin, here: Place, reason: str) -> Fitting:
    """The plan that was built for this place, now or before, from the graph that passed parity."""
    if here.compute_capability is None:
        raise UserError("here is no GPU to build for")
    if here.library != manifest["library"]:
        raise UserError(f"it is to be built by {manifest['library']}")
    folder = plan.parent.with_name(f"{plan.parent.name}.rebuilt") / f"sm{here.compute_capability.replace('.', '')}"
    name = plan_name(origin.variant, here.compute_capability, origin.spec.stem)
    made = folder / name.removesuffix(".plan") / name  # each in a folder of its own, which is there whole or not at all
    if (found := _made_before(made, manifest, here, reason)) is not None:
        return found
    with in_turn(plan.parent, _BUILD_LIMIT_S, "building in place of an engine in"):
        if (found := _made_before(made, manifest, here, reason)) is not None:  # by the one that was waited for
            return found
        parity = _build(manifest, origin, made, here)
    numbers = "no GPU is here to compare its numbers" if parity is None else "it gives its graph's numbers"
    Console(stderr=True, highlight=False).print(
        f"{reason}: {made} was built in its place; its layers have been read back, {numbers}", soft_wrap=True
    )
    return Fitting(made, parity, reason)


def _made_before(made: Path, manifest: Mapping[str, Any], here: Place, reason: str) -> Fitting | None:
    """The plan that an earlier call built of the same graph, if it fits and its numbers are known as far as they can
    be."""
    if not (made.is_file() and manifest_of(made).is_file()):
        return None
    before = read_manifest(made)
    known = before.get("parity") is not None or not gpus()
    if before["onnx"] == manifest["onnx"] and known and not _misfit(made, before, here):
        return Fitting(made, before.get("parity"), reason)
    return None


def _build(manifest: Mapping[str, Any], origin: Origin, made: Path, here: Place) -> dict[str, Any] | None:
    """Write the engine with its manifest, whole or not at all: same graph, profiles and options, another place. Returns
    what its numbers differ by, where a GPU is here to run it; GateFailed if by too much."""
    assert here.compute_capability is not None
    options = {name: manifest[name] for name in ("tf32", "version_compatible", "hardware_compatibility")}
    settings = TensorRT(library=manifest["library"], **options)
    builder, graph = Builder(manifest["library"]), origin.graph
    begun_s = time.perf_counter()
    plan, description = builder.build_shapes(graph, manifest["profiles"], settings, here.compute_capability)
    build_s = time.perf_counter() - begun_s
    if not builder.ahead_of_time:
        description = builder.describe(plan)
    variant = manifest["variant"]
    what = f"{variant} for {here.compute_capability}"
    audited = audit(what, variant, read_layers(description), products(graph), manifest["audit"]["wider_share"])
    with staging(made.parent) as partial:
        path = partial / made.name
        path.write_bytes(plan)
        about = {name: manifest[name] for name in _KEPT} | {"stem": origin.spec.stem}
        about |= {"audit": audited, "build_s": build_s, "in_place_of": manifest["plan"]}
        write_manifest(path, here, graph, about | {"parity": None})
        parity = _hold(origin, path)
        write_manifest(path, here, graph, about | {"parity": parity})
    return parity


def main(exported: Path, variant: str, path: Path) -> None:
    """Make the engines of a variant ready, in a process of its own, and write into `path` which they are, one for each
    graph of the model."""
    engines = [
        {"plan": str(found.plan), "sha256": hash_file(found.plan), "file_mib": found.plan.stat().st_size / 2**20,
         "build_s": read_manifest(found.plan).get("build_s"), "parity": found.parity, "instead": found.instead}
        for found in fitting_plans(exported, variant)
    ]  # fmt: skip
    write_json(path, {"engines": engines})


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    except UserError as error:  # `bench` puts the last line into the report
        print(str(error).replace("\n", "; "), file=sys.stderr)
        raise SystemExit(error.exit_code) from None

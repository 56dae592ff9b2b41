"""The tensorrt stage: verified ONNX files to engines, by TensorRT (10, 11) or TensorRT-RTX through their common API.
Precision is written in the ONNX and read back from the engine by `audit`; running engines is `tensorrt_runner`'s.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from rich.console import Console

from export.audit import audit, read_layers
from export.cases import load_documents
from export.engine_files import Place, plan_name, write_manifest
from export.engine_proof import prove_engine
from export.files import hashes
from export.io_spec import BATCH, ENCODED, PAST, SEQUENCE, IoSpec, Port
from export.precision import open_form
from export.profiles import shape_of
from export.runners import usable_threads
from export.tensorrt_library import load_library, messages_of, this_place
from export.tensorrt_runner import open_engine
from export.verified import Subject, Verified, subjects
from trainer.__main__ import stage_main
from trainer.artifact import hash_file, staging, write_artifact
from trainer.config import Recipe
from trainer.environment import gpus, launch_command
from trainer.errors import GateFailed, UserError
from trainer.export_config import Export
from trainer.recipe_file import recipe_hash, require_section
from trainer.serving_config import Profile, TensorRT

# What TensorRT-RTX 1.7 builds for ahead of time that lmworks' users run: A100, L40S and RTX 40, RTX 50.
_AHEAD_OF_TIME = ("8.0", "8.9", "12.0")
_PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")
_FP8_SINCE = (8, 9)  # Ada; Hopper is 9.0 (NVIDIA, "FP8 formats for deep learning")
_KEPT_MESSAGES = 5


def run(recipe: Recipe) -> None:
    """Build engines of every model that the recipe names into `<run_dir>/tensorrt/<name>`.

    Raises GateFailed for an engine that multiplies in another precision than asked, or that differs from its graph on
    the GPU that is here, and UserError where the library is missing or refuses.
    """
    require_section(recipe, "tensorrt")
    assert recipe.tensorrt is not None
    found = subjects(recipe, "tensorrt", recipe.tensorrt.models)
    builder = open_builder(recipe.tensorrt)
    for subject in found:
        build_engines(recipe, recipe.tensorrt, builder, subject)


class Builder:
    """One of the two libraries, and the place that it builds at."""

    def __init__(self, name: str) -> None:
        self.library = load_library(name)
        self.place = this_place(name, self.library)
        self.ahead_of_time = name == "tensorrt_rtx"

    def problem(self, path: Path) -> str:
        """Why the library cannot read a graph, or nothing."""
        messages = messages_of(self.library)
        builder = self.library.Builder(messages)
        _, _, problem = self._parse(builder, messages, path)
        return problem

    def build(
        self, path: Path, spec: IoSpec, settings: TensorRT, compute_capability: str, timing: Path | None = None
    ) -> tuple[bytes, str]:
        """An engine of a graph file for the profiles of `settings`, and the library's description of its layers."""
        return self.build_shapes(path, engine_shapes(spec, settings), settings, compute_capability, timing)

    def build_shapes(
        self,
        path: Path,
        profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]],
        settings: TensorRT,
        compute_capability: str,
        timing: Path | None = None,
    ) -> tuple[bytes, str]:
        """The same for given shapes: a profile names for each input its smallest, best tuned and largest.

        `timing` is a file of what earlier builds measured, which is read and written. Raises UserError with the
        library's own words where it refuses.
        """
        library, messages = self.library, messages_of(self.library)
        builder = library.Builder(messages)
        network, parser, problem = self._parse(builder, messages, path)
        if problem:
            raise UserError(f"{library.__name__} {library.__version__} cannot read {path}: {problem}", "such a graph")
        config = builder.create_builder_config()
        config.profiling_verbosity = library.ProfilingVerbosity.DETAILED  # or it does not tell types
        self._set_options(config, settings, compute_capability)
        cache = self._set_timing(config, timing)
        for shapes in profiles:
            profile = builder.create_optimization_profile()
            for name, three in shapes.items():
                profile.set_shape(name, *map(tuple, three))
            if config.add_optimization_profile(profile) < 0:
                raise _refused(library, path, compute_capability, messages)
        plan = builder.build_serialized_network(network, config)
        del parser  # not before: it owns the weights that the network points to
        if plan is None:
            raise _refused(library, path, compute_capability, messages)
        if cache is not None and timing is not None:
            timing.write_bytes(bytes(cache.serialize()))
        return bytes(plan), messages.text()

    def describe(self, plan: bytes) -> str:
        """The layers of an engine that can be loaded here, as its inspector tells them."""
        runtime = self.library.Runtime(messages_of(self.library))
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise GateFailed("the engine that was just built cannot be loaded", "one that loads")
        text: str = engine.create_engine_inspector().get_engine_information(self.library.LayerInformationFormat.ONELINE)
        return text

    def _parse(self, builder: Any, messages: Any, path: Path) -> tuple[Any, Any, str]:
        flag = 1 << int(self.library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flag)
        parser = self.library.OnnxParser(network, messages)
        read = parser.parse_from_file(str(path))
        errors = [_said(parser.get_error(index)) for index in range(parser.num_errors)]
        return network, parser, "" if read else "; ".join(dict.fromkeys(errors)) or "it does not say why"

    def _set_options(self, config: Any, settings: TensorRT, compute_capability: str) -> None:
        flags = self.library.BuilderFlag
        if settings.version_compatible:
            if self.ahead_of_time:  # 1.7 lacks the lean runtime that such an engine holds
                raise UserError("tensorrt.version_compatible is TensorRT's", "false for tensorrt_rtx", "leave it out")
            config.set_flag(flags.VERSION_COMPATIBLE)
        (config.set_flag if settings.tf32 else config.clear_flag)(flags.TF32)
        if settings.hardware_compatibility != "none":
            if self.ahead_of_time:
                raise UserError(
                    "tensorrt.hardware_compatibility is TensorRT's", "none for tensorrt_rtx", "leave it out"
                )
            level = getattr(self.library.HardwareCompatibilityLevel, settings.hardware_compatibility.upper())
            config.hardware_compatibility_level = level
        if self.ahead_of_time:
            config.num_compute_capabilities = 1
            name = f"SM{compute_capability.replace('.', '')}"
            known = self.library.ComputeCapability.__members__
            if name not in known:
                raise UserError(
                    f"{self.place.library} {self.place.library_version} does not build for {compute_capability}",
                    f"one of {', '.join(one for one in known if one.startswith('SM'))}",
                    "mend tensorrt.compute_capabilities",
                )
            config.set_compute_capability(known[name], 0)

    def _set_timing(self, config: Any, timing: Path | None) -> Any:
        """TensorRT measures its kernels once a GPU and version; TensorRT-RTX has nothing to measure."""
        if self.ahead_of_time or timing is None:
            return None
        cache = config.create_timing_cache(timing.read_bytes() if timing.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
        return cache


def open_builder(settings: TensorRT) -> Builder:
    """The library that the recipe asks for; auto says which it took and why."""
    if settings.library != "auto":
        return Builder(settings.library)
    has_gpu = bool(gpus())
    name = "tensorrt" if has_gpu and util.find_spec("tensorrt") else "tensorrt_rtx"
    why = "a GPU and TensorRT are here" if name == "tensorrt" else "no GPU is here" if not has_gpu else "no TensorRT is"
    Console(highlight=False).print(f"tensorrt.library auto takes {name}: {why}")
    return Builder(name)


def build_engines(recipe: Recipe, settings: TensorRT, builder: Builder, subject: Subject) -> Path:
    """Write the engine folder of one model; returns it. On any failure nothing new is left behind."""
    chosen = choose_variants(settings, builder, subject)
    target = recipe.stage_dir("tensorrt") / subject.name
    timing = target.parent / _timing_name(builder.place)
    evidence = []
    with staging(target) as partial:
        for one in chosen:
            for compute_capability in capabilities_for(one.variant, settings, builder):
                made = [
                    _build_graph(settings, builder, subject, part, one, compute_capability, partial, timing)
                    for part in subject.spec.parts
                ]
                evidence += _describe(recipe, settings, builder, subject, one, compute_capability, made)
        write_artifact(
            partial,
            "engines",
            recipe_sha256=recipe_hash(recipe),
            parents={"onnx": subject.record["content_sha256"]},
            evidence=evidence,
            about={"library": builder.place.library, "library_version": builder.place.library_version},
        )
    return target


@dataclass(frozen=True)
class _Made:
    """An engine that was written, of one graph, and what its audit found."""

    part: IoSpec
    what: str
    graph: Path
    plan: Path
    audited: dict[str, Any]
    build_s: float


def _build_graph(
    settings: TensorRT, builder: Builder, subject: Subject, part: IoSpec, one: Verified, compute_capability: str,
    partial: Path, timing: Path,
) -> _Made:  # fmt: skip
    """Write the engine of one graph, and hold its layers against the precision of its form."""
    graph = dict(zip(subject.spec.parts, one.files, strict=True))[part]
    begun_s = time.perf_counter()
    plan, description = builder.build(graph, part, settings, compute_capability, timing)
    build_s = time.perf_counter() - begun_s
    path = partial / plan_name(one.variant, compute_capability, part.stem)
    path.write_bytes(plan)
    if builder.place.compute_capability == compute_capability:
        description = builder.describe(plan)
    what = f"{subject.name} {one.variant} for {compute_capability}" + (f" ({part.stem})" if part.cross else "")
    audited = audit(what, one.variant, read_layers(description), products(graph), settings.max_wider_share)
    return _Made(part, what, graph, path, audited, build_s)


def _describe(
    recipe: Recipe, settings: TensorRT, builder: Builder, subject: Subject, one: Verified, compute_capability: str,
    made: Sequence[_Made],
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the manifests of one form's engines, of an encoder-decoder's each names the other; returns the evidence."""
    evidence = []
    for each in made:
        about = _about(settings, each.part, one.variant, compute_capability)
        about |= {"audit": each.audited, "build_s": each.build_s}
        if len(made) > 1:
            about["beside"] = [hashes(other.plan) for other in made if other is not each]
        write_manifest(each.plan, builder.place, each.graph, about)
        kind, of = each.part.prefix, (one.variant, compute_capability, each.plan)
        evidence.append(_evidence(f"{kind}audit", *of, each.audited))
        if builder.place.compute_capability == compute_capability:
            proof = prove(recipe, each.what, subject, each.part, one, each.plan)
            evidence.append(_evidence(f"{kind}parity", *of, proof["metrics"]))
        _tell(each)
    return evidence


def prove(recipe: Recipe, what: str, subject: Subject, part: IoSpec, one: Verified, plan: Path) -> dict[str, Any]:
    """Run an engine on the GPU that is here, on real text within its profiles; evidence that it gives the numbers of
    the fp32 graph (or of its own, where there is none). GateFailed where it does not."""
    parity, graphs = (recipe.export or Export()).parity, subject.spec.parts
    origin = subject.variants.get("fp32", one)
    sources = dict(zip(graphs, origin.files, strict=True))
    source = open_form([sources[each] for each in part.parts], origin.variant, part, usable_threads())
    engine = open_engine(plan, part, dict(zip(graphs, one.files, strict=True))[part])
    documents = load_documents(recipe, subject.folder)
    return prove_engine(what, part, engine, source, documents, parity, getattr(parity, one.variant), recipe.seed)


def choose_variants(settings: TensorRT, builder: Builder, subject: Subject) -> list[Verified]:
    """The variants that the recipe names, or those that the library reads; the others are said, with the reason."""
    missing = [name for name in settings.variants if name not in subject.variants]
    if missing:
        raise UserError(
            f"tensorrt.variants names {', '.join(missing)}, which {subject.folder} has not in verified form",
            f"one of {', '.join(subject.variants)}",
            "add it to export.variants and export again",
        )
    if settings.variants:
        return [subject.variants[name] for name in settings.variants]
    chosen = []
    for one in subject.variants.values():
        problem = next(filter(None, map(builder.problem, one.files)), "")
        if problem:
            Console(highlight=False).print(f"{subject.name} {one.variant}: no engine: {problem}", soft_wrap=True)
        else:
            chosen.append(one)
    if not chosen:
        raise UserError(f"{builder.place.library} reads no variant of {subject.name}", "fp32, fp16 or bf16 in export")
    return chosen


def choose_capabilities(settings: TensorRT, builder: Builder) -> tuple[str, ...]:
    """What engines are built for: the recipe's list, or what the library is for."""
    if builder.ahead_of_time:
        return settings.compute_capabilities or _AHEAD_OF_TIME
    own = builder.place.compute_capability
    if own is None:
        raise UserError("TensorRT builds on the GPU that it builds for, and here is none", "a GPU, or tensorrt_rtx")
    if settings.compute_capabilities not in ((), (own,)):
        raise UserError(
            f"tensorrt.compute_capabilities names {', '.join(settings.compute_capabilities)}; this GPU has {own}",
            "the GPU's own: TensorRT builds for no other",
            "leave it out, or take tensorrt_rtx",
        )
    return (own,)


def capabilities_for(variant: str, settings: TensorRT, builder: Builder) -> tuple[str, ...]:
    """The same for one variant. Of a list that is not the recipe's, those that cannot multiply in it are left out."""
    chosen = choose_capabilities(settings, builder)
    lacking = [one for one in chosen if variant == "fp8" and tuple(map(int, one.split("."))) < _FP8_SINCE]
    if lacking and (settings.compute_capabilities or len(lacking) == len(chosen)):
        raise UserError(
            f"an engine in fp8 for compute capability {', '.join(lacking)}",
            f"{'.'.join(map(str, _FP8_SINCE))} or more: older GPUs multiply no fp8",
            "leave it out of tensorrt.compute_capabilities, or fp8 out of tensorrt.variants",
        )
    if lacking:
        Console(highlight=False).print(f"fp8: no engine for {', '.join(lacking)}: older GPUs multiply no fp8")
    return tuple(one for one in chosen if one not in lacking)


def products(path: Path) -> list[str]:
    """Nodes of a graph that multiply two matrices."""
    graph = onnx.load(path, load_external_data=False).graph
    return [node.name for node in graph.node if node.op_type in _PRODUCTS]


def profile_shapes(port: Port, spec: IoSpec, profile: Profile) -> tuple[tuple[int, ...], ...]:
    """Smallest, best tuned and largest shape of one input.

    A decoder with an encoder takes one token a call, as generating does: the profile's length is the encoded text's.
    """
    lengths = [min(length, spec.max_length) for length in profile.sequence_length]
    pasts = [min(length, spec.max_length) for length in profile.past_length]
    return tuple(
        shape_of(port, {BATCH: batch, SEQUENCE: 1 if spec.encoder else length, ENCODED: length, PAST: past})
        for batch, length, past in zip(profile.batch_size, lengths, pasts, strict=True)
    )


def engine_shapes(spec: IoSpec, settings: TensorRT) -> list[dict[str, tuple[tuple[int, ...], ...]]]:
    """For each profile the shapes of all inputs."""
    return [{port.name: profile_shapes(port, spec, one) for port in spec.inputs} for one in settings.profiles]


def _said(error: Any) -> str:
    """What a parser says of a node, which of an operator that it does not take is a bare "false"."""
    text, operator = error.desc(), error.node_operator()
    return f"it does not take {operator}" if text == "false" and operator else text


def _refused(library: ModuleType, path: Path, compute_capability: str, messages: Any) -> UserError:
    said = "; ".join(messages.errors()[:_KEPT_MESSAGES]) or "it does not say why"
    return UserError(
        f"{library.__name__} {library.__version__} builds no engine of {path} for {compute_capability}: {said}",
        "a graph and a target that it takes",
    )


def _timing_name(place: Place) -> str:
    gpu = (place.gpu or "none").replace(" ", "-")
    return f"timing_{place.library_version}_sm{(place.compute_capability or '').replace('.', '')}_{gpu}.cache"


def _about(settings: TensorRT, spec: IoSpec, variant: str, compute_capability: str) -> dict[str, Any]:
    return {
        "variant": variant,
        "stem": spec.stem,
        "compute_capability": compute_capability,
        "profiles": engine_shapes(spec, settings),
        "tf32": settings.tf32,
        "version_compatible": settings.version_compatible,
        "hardware_compatibility": settings.hardware_compatibility,
    }


def _evidence(kind: str, variant: str, compute_capability: str, path: Path, metrics: Any) -> dict[str, Any]:
    return {
        "what": f"{kind}_{variant}_{compute_capability}",
        "file": path.name,
        "sha256": hash_file(path),
        "command": launch_command(),
        "metrics": metrics,
    }


def _tell(made: _Made) -> None:
    types = ", ".join(f"{count} in {name}" for name, count in made.audited["types"].items())
    size = f"{made.plan.stat().st_size / 2**20:.1f} MiB, built in {made.build_s:.1f} s"
    Console(highlight=False).print(f"{made.what}: {size}; matrix layers read back: {types}", soft_wrap=True)


if __name__ == "__main__":
    stage_main("tensorrt")

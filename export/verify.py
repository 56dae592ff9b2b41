"""`lmworks verify export`: what lies in the export folders is held against its sources anew, and forms that are not
there are made and held; with --bisect, a form that fails is told with the first node that departs.
Nothing is written but a report; making exports is `export`'s.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from export.bisect import first_departure, first_module
from export.calibration import text_finder
from export.cases import load_documents
from export.decoding_graph import has_room
from export.gates import Gates, TaskGate
from export.hostile import check_graph
from export.io_spec import IoSpec, read_spec
from export.precision import open_form, runnable
from export.probe import Probe
from export.runners import CPU_PROVIDER, open_onnx, usable_threads
from export.to_onnx import export_graph, load_model
from export.variants import TRIED, check_tried, check_variants, make_variant
from trainer.artifact import ARTIFACT_FILE, read_artifact, write_json
from trainer.config import Recipe
from trainer.environment import launch_command
from trainer.errors import GateFailed, UserError
from trainer.export_config import Export, Precision
from trainer.recipe_file import require_section

# Tensors of one and the same precision are apart by their order of addition only; other forms by their tolerance.
_UNLIMITED_RELATIVE_RMS = 1e-5


def run(recipe: Recipe, what: str, bisect: bool = False) -> None:
    """Check every form that the recipe names; GateFailed, after all were tried, if any fails."""
    require_section(recipe, "export")
    assert recipe.export is not None
    models = recipe.exported_models()
    if not models:
        raise UserError("there is no model to verify", "pretrain, distill or export.models", "name one in the recipe")
    rows = [row for name, folder in models.items() for row in verify_model(recipe, recipe.export, name, folder, bisect)]
    path = recipe.run_dir / "verify" / f"{what}.json"
    write_json(path, {"what": f"verify {what}", "command": launch_command(), "rows": rows})
    failed = [row for row in rows if not row["passed"]]
    anew = sum(not row["exported"] for row in rows)
    made = f" ({anew} made anew, as they are not exported)" if anew else ""
    print(f"verify {what}: {len(rows) - len(failed)} of {len(rows)} forms passed{made}; {path}")
    if failed:
        raise GateFailed("\n  ".join([f"{what}: {len(failed)} forms fail", *(row["found"] for row in failed)]))


def verify_model(recipe: Recipe, settings: Export, name: str, folder: Path, bisect: bool) -> Iterator[dict[str, Any]]:
    """One row for each form of a model: whether it passed, from which file, and what was found."""
    spec = read_spec(folder)
    check_variants(name, spec, settings)
    documents = load_documents(recipe, folder)
    exported, find = recipe.stage_dir("export") / name, text_finder(recipe, folder, documents)
    # fp32 whatever the recipe names: all others are made of it under looser gates, as in `export`.
    variants: tuple[Precision, ...] = tuple(dict.fromkeys(("fp32", *_wanted(settings, name, spec, exported))))
    with tempfile.TemporaryDirectory() as scratch:
        for part in spec.parts:
            gates = Gates(folder, part, settings, documents, find, recipe.seed)
            yield from _verify_graph(settings, name, folder, gates, variants, exported, Path(scratch), bisect)
        if spec.encoder is not None and settings.quality is not None:
            gate = TaskGate(folder, spec, settings, documents, recipe.seed)
            for variant in variants:
                files = [_form(exported, Path(scratch), file) for file in spec.files(variant)]
                names, are_there = (file.name for file in files), (file.parent == exported for file in files)
                row = {"model": name, "variant": variant, "file": " and ".join(names), "exported": all(are_there)}
                yield row | _held(functools.partial(_check_whole, settings, name, spec, gate, variant, files))


def _form(exported: Path, scratch: Path, name: str) -> Path:
    """A form's file: the exported one, or the one made anew where there is none."""
    return exported / name if (exported / name).is_file() else scratch / name


def _check_whole(
    settings: Export, name: str, spec: IoSpec, gate: TaskGate, variant: Precision, files: list[Path]
) -> list[dict[str, Any]]:
    """Evidence of an encoder-decoder's two graphs together, on what it is for."""
    runner = open_form(files, variant, spec, usable_threads(), settings.provider)
    return gate.check(f"{name} {variant}", variant, files, runner)


def _verify_graph(
    settings: Export, name: str, folder: Path, gates: Gates, variants: Sequence[Precision], exported: Path,
    scratch: Path, bisect: bool,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    spec = gates.spec
    raw = scratch / spec.file("fp32")
    wanted: dict[Precision, Path] = {variant: exported / spec.file(variant) for variant in variants}
    if bisect or not all(file.is_file() for file in wanted.values()):
        export_graph(load_model(folder, spec), spec, raw, settings.opset)
    for variant, named in wanted.items():
        file = _form(exported, scratch, named.name)
        row: dict[str, Any] = {"model": name, "variant": variant, "file": file.name, "exported": file == named}
        try:
            if file != named:
                make_variant(variant, raw, file, lambda: gates.calibration, settings.calibration, settings.provider)
        except UserError as problem:
            yield row | {"passed": False, "found": str(problem).replace("\n", "; ")}
            continue
        row |= _held(functools.partial(_check_graph, settings, name, gates, variant, file))
        if bisect and not row["passed"]:
            row["found"] += f"\n    {_where(gates, variant, raw, file)}"
        yield row


def _wanted(settings: Export, name: str, spec: IoSpec, exported: Path) -> tuple[Precision, ...]:
    """The forms that the recipe names; of auto those that it kept or, before an export, all that can be had here."""
    if settings.variants != "auto":
        return settings.variants
    if (exported / ARTIFACT_FILE).is_file():
        found = {proof["what"] for proof in read_artifact(exported, "onnx")["evidence"]}
        return tuple(variant for variant in get_args(Precision) if f"parity_{variant}" in found)
    possible = []
    for variant in TRIED:
        with contextlib.suppress(UserError):
            check_tried(name, spec, variant, settings.provider)
            possible.append(variant)
    return tuple(possible)


def _check_graph(settings: Export, name: str, gates: Gates, variant: Precision, file: Path) -> list[dict[str, Any]]:
    check_graph(file)
    with runnable(file, variant, settings.provider) as opened:
        runner = open_onnx(opened, usable_threads(), settings.provider)
    return gates.check(f"{name} {variant} ({file.name})", variant, file, runner)


def _held(check: Callable[[], list[dict[str, Any]]]) -> dict[str, Any]:
    """What a check found: evidence, or why the form failed."""
    try:
        evidence = check()
    except GateFailed as failure:
        return {"passed": False, "found": str(failure).replace("\n", "; ")}
    return {"passed": True, "found": {proof["what"]: proof["metrics"] for proof in evidence}}


def _where(gates: Gates, variant: Precision, raw: Path, file: Path) -> str:
    """The first node that departs from a raw graph made anew or, if none does, the first module where that departs."""
    spec, parity = gates.spec, gates.settings.parity
    limit, raw_limit = (getattr(parity, one).relative_rms or _UNLIMITED_RELATIVE_RMS for one in (variant, "fp32"))
    cases = gates.probed()
    full = [case for case in cases if case.mask.all()]
    # Padding's own values are others in fused attention and in PyTorch, so that these are compared without any.
    with runnable(file, variant, CPU_PROVIDER) as opened:
        reference, candidate = (Probe(one, usable_threads()) for one in (raw, opened))
        for case in full if has_room(file) else cases:
            found = first_departure(reference, candidate, case.inputs, limit)
            if found is not None:
                return f"first departure, in case {case.name}: {found}"
    model = load_model(gates.folder, spec)
    for case in full:
        module = first_module(model, spec, reference, case.inputs, raw_limit)
        if module is not None:
            return f"it is its raw graph within {limit:g}, which is not the model: {module}"
    return (
        f"no inner value departs by more than {limit:g} from a raw graph of {spec.architecture} made anew, nor that one"
    )

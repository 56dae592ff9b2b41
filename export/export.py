"""The export stage: model folders to ONNX folders, in each form that the recipe names, that passed the gates.
Tracing, quantizing and comparing are done by the modules it wires together here.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from export import labelled
from export.bench_inputs import METRICS
from export.calibration import text_finder
from export.cases import Documents, load_documents
from export.files import data_file, size_mib
from export.front import Form, choose, measure_form, timed_inputs
from export.gates import Gates
from export.io_spec import IoSpec, read_spec
from export.runners import open_onnx, usable_threads
from export.to_onnx import export_graph, load_model
from export.variants import TRIED, check_variant, check_variants, make_variant
from trainer.__main__ import stage_main
from trainer.artifact import hash_tree, staging, write_artifact
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError
from trainer.export_config import Export, Precision
from trainer.recipe_file import recipe_hash, require_section

# What a server needs beside the graph: everything of a transformers folder that is not weights or our own records.
_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")
_NOT_BESIDE = ("artifact.json", "*.safetensors.index.json", "*.bin.index.json", "trainer_state.json", "README*")

MakeForm = Callable[[Precision], list[dict[str, Any]]]


def run(recipe: Recipe) -> None:
    """Export every model of the recipe to `<run_dir>/export/<name>`; GateFailed if one differs from its source."""
    require_section(recipe, "export")
    assert recipe.export is not None
    models = recipe.exported_models()
    if not models:
        raise UserError("there is no model to export", "pretrain, distill or export.models", "name one in the recipe")
    specs = {name: read_spec(folder) for name, folder in models.items()}
    for name, spec in specs.items():  # refuse before the first model is worked on
        check_variants(name, spec, recipe.export)
    check_quality_gates(recipe.export, specs)
    for name, folder in models.items():
        try:
            export_model(recipe, recipe.export, name, folder, load_documents(recipe, folder))
        except GateFailed as failure:
            search = "`lmworks verify export RECIPE --bisect` names the node at which the form departs"
            raise GateFailed(str(failure), do=search) from None


def check_quality_gates(settings: Export, specs: Mapping[str, IoSpec]) -> None:
    """Say which models have no gate on their quality; UserError for labelled text that no model is for."""
    if settings.quality is None:
        return
    tasks = {name: spec.task for name, spec in specs.items()}
    if settings.quality.labelled and not any(task in labelled.METRICS for task in tasks.values()):
        raise UserError(
            f"export.quality.labelled is given, and the models are of {', '.join(sorted(set(tasks.values())))}",
            f"one of {', '.join(labelled.METRICS)}",
            "leave it out",
        )
    for name, task in tasks.items():
        if task not in METRICS and not (task in labelled.METRICS and settings.quality.labelled):
            needs = "export.quality.labelled is not given" if task in labelled.METRICS else "nothing measures it"
            said = f"{name}: {needs}: a form of a {task} model is held by parity (and the highest score's place) alone"
            Console(highlight=False).print(said, soft_wrap=True)


def export_model(recipe: Recipe, settings: Export, name: str, folder: Path, documents: Documents) -> Path:
    """Write the ONNX folder of one model; returns it. On any failure nothing is left behind.

    `documents` are token ids of real text, which the parity gate runs on.
    """
    spec = read_spec(folder)
    source = hash_tree(folder)
    find = text_finder(recipe, folder, documents)
    gates = [Gates(folder, part, settings, documents, find, recipe.seed) for part in spec.parts]
    target = recipe.stage_dir("export") / name
    with staging(target) as partial:
        evidence = [proof for each in gates for proof in _write_forms(settings, name, folder, each, partial)]
        copy_companions(folder, partial)
        if hash_tree(folder) != source:
            raise UserError(f"{folder} changed while it was exported", "a model that stays as it is", "export it again")
        write_artifact(
            partial,
            "onnx",
            recipe_sha256=recipe_hash(recipe),
            parents={"model": source},
            evidence=evidence,
            about={
                "architecture": spec.architecture,
                "task": spec.task,
                "inputs": [str(port) for port in spec.inputs],
                "outputs": [str(port) for port in spec.outputs],
                **_encoder_face(spec),
                "opset": settings.opset,
                "max_length": spec.max_length,
            },
        )
    return target


def _write_forms(settings: Export, name: str, folder: Path, gates: Gates, partial: Path) -> list[dict[str, Any]]:
    """Write one graph of a model in its forms; returns the evidence that they passed."""
    spec = gates.spec
    raw = partial / spec.file("fp32")
    export_graph(load_model(folder, spec), spec, raw, settings.opset)

    def make(variant: Precision) -> list[dict[str, Any]]:
        """A form in its file; the evidence that it passed the gates."""
        file = partial / spec.file(variant)
        made = make_variant(variant, raw, file, lambda: gates.calibration, settings.calibration)
        runner = open_onnx(file, usable_threads(), settings.provider)
        return [proof | made for proof in gates.check(f"{name} {variant} ({file.name})", variant, file, runner)]

    if settings.variants == "auto":
        evidence = _choose_forms(name, spec, settings, gates.documents, partial, make)
    else:
        evidence = []
        for variant in dict.fromkeys(("fp32", *settings.variants)):  # of fp32 all are made, under looser gates
            passed = make(variant)
            _tell(f"{name} {variant}", partial / spec.file(variant), passed)
            evidence += passed if variant in settings.variants else [_of_parent(proof) for proof in passed]
    kept = {proof["file"] for proof in evidence if "file" in proof}
    for file in (partial / spec.file(variant) for variant in get_args(Precision)):
        if file.name not in kept:
            file.unlink(missing_ok=True)
            data_file(file).unlink(missing_ok=True)
    return evidence


def _of_parent(proof: Mapping[str, Any]) -> dict[str, Any]:
    """Evidence of the fp32 graph where it is not shipped: what was found, on which bytes, but no file to look for."""
    named = {key: value for key, value in proof.items() if key not in ("what", "file", "sha256", "data_sha256")}
    return {"what": f"parent_{proof['what']}", "parent_sha256": proof["sha256"], **named}


def _choose_forms(
    name: str, spec: IoSpec, settings: Export, documents: Documents, folder: Path, make: MakeForm
) -> list[dict[str, Any]]:
    """Try every form that there is, say what became of each, and return the evidence of those worth having."""
    proofs: dict[Precision, list[dict[str, Any]]] = {}
    timed, inputs = timed_inputs(documents, spec)

    def attempt(variant: Precision) -> Form:
        check_variant(name, spec, variant, settings.provider)
        file = folder / spec.file(variant)
        proofs[variant] = make(variant)
        again = lambda: open_onnx(file, usable_threads(), settings.provider)  # noqa: E731
        return measure_form(variant, proofs[variant], again, inputs, size_mib(file))

    choice = choose(TRIED, attempt)
    for variant, what in choice.became.items():
        Console(highlight=False).print(f"{name} {variant}: {what}", soft_wrap=True, markup=False)
    return [proof for variant in choice.kept for proof in proofs[variant]] + [choice.evidence(timed)]


def _encoder_face(spec: IoSpec) -> dict[str, list[str]]:
    if spec.encoder is None:
        return {}
    ports = {"encoder_inputs": spec.encoder.inputs, "encoder_outputs": spec.encoder.outputs}
    return {which: [str(port) for port in its] for which, its in ports.items()}


def copy_companions(source: Path, target: Path) -> None:
    """Copy config and tokenizer files of a model folder, so that transformers opens the exported one too."""
    for pattern in _BESIDE:
        for file in source.glob(pattern):
            if not any(file.match(unwanted) for unwanted in _NOT_BESIDE):
                shutil.copyfile(file, target / file.name)


def _tell(form: str, file: Path, evidence: list[dict[str, Any]]) -> None:
    parity = evidence[0]["metrics"]
    said = (
        f"{form} ({file.name}): {size_mib(file):.1f} MiB; parity holds in {parity['cases']} cases: max_abs "
        f"{parity['max_abs']:.2g}, relative_rms {parity['relative_rms']:.2g}, top-1 {parity['top1']:.2%}"
    )
    for proof in evidence[1:]:
        quality = proof["metrics"]
        said += (
            f"; {quality['metric']} {quality['value']:.4g}, {quality['kept']:.2%} of the source's quality "
            f"({quality['kept_low']:.2%} to {quality['kept_high']:.2%})"
        )
    Console(highlight=False).print(said, soft_wrap=True)


if __name__ == "__main__":
    stage_main("export")

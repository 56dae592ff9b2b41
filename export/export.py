"""The export stage: model folders to ONNX folders, in each form that the recipe names, that passed the gates.
Tracing, quantizing and comparing are done by the modules it wires together here.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from export import labelled
from export.bench_inputs import METRICS
from export.calibration import text_finder
from export.cases import Documents, load_documents
from export.files import data_file, size_mib
from export.front import Form, choose, measure_form, timed_inputs
from export.gates import Gates, TaskGate
from export.io_spec import IoSpec, read_spec
from export.precision import runnable
from export.runners import OnnxRunner, open_onnx, open_onnx_graphs, together, usable_threads
from export.to_onnx import export_graph, load_model
from export.variants import TRIED, check_tried, check_variants, make_variant
from trainer.__main__ import stage_main
from trainer.artifact import hash_tree, staging, write_artifact, write_json
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError
from trainer.export_config import Export, Precision
from trainer.recipe_file import recipe_hash, require_section

# What a server needs beside the graph: everything of a transformers folder that is not weights or our own records.
_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")
_NOT_BESIDE = ("artifact.json", "*.safetensors.index.json", "*.bin.index.json", "trainer_state.json", "README*")
# What of evidence says which files it is of.
_NAMES_OF_FILES = ("what", "file", "sha256", "data_sha256", "encoder")

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
            "leave it out: language models, encoder-decoders too, are judged by their perplexity on text",
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
    check_links(folder)
    source = hash_tree(folder)
    find = text_finder(recipe, folder, documents)
    gates = [Gates(folder, part, settings, documents, find, recipe.seed) for part in spec.parts]
    whole = TaskGate(folder, spec, settings, documents, recipe.seed) if spec.encoder else None
    target = recipe.stage_dir("export") / name
    with staging(target) as partial:
        evidence = _write_forms(settings, name, folder, gates, whole, partial)
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


def _write_forms(
    settings: Export, name: str, folder: Path, gates: Sequence[Gates], whole: TaskGate | None, partial: Path
) -> list[dict[str, Any]]:
    """Write the graphs of a model in its forms; returns the evidence that they passed.

    `gates`: of each graph, `whole`: of an encoder-decoder's two together.
    """
    spec = gates[-1].spec
    for part in spec.parts:
        export_graph(load_model(folder, part), part, partial / part.file("fp32"), settings.opset)

    def make(variant: Precision) -> list[dict[str, Any]]:
        """A form in its files; the evidence that it passed the gates, those of each graph first."""
        graphs = [_write_graph(settings, name, each, variant, partial) for each in gates]
        evidence = [proof for _, passed in graphs for proof in passed]
        if whole is None:
            return evidence
        runner, files = together([runner for runner, _ in graphs], spec), [partial / one for one in spec.files(variant)]
        return evidence + whole.check(f"{name} {variant}", variant, files, runner)

    if settings.variants == "auto":
        evidence = _choose_forms(name, spec, settings, gates[0].documents, partial, make)
    else:
        evidence = []
        for variant in dict.fromkeys(("fp32", *settings.variants)):  # of fp32 all are made, under looser gates
            passed = make(variant)
            _tell(f"{name} {variant}", partial, passed)
            evidence += passed if variant in settings.variants else [_of_parent(proof) for proof in passed]
    kept = {proof["file"] for proof in evidence if "file" in proof}
    for file in (partial / file for variant in get_args(Precision) for file in spec.files(variant)):
        if file.name not in kept:
            file.unlink(missing_ok=True)
            data_file(file).unlink(missing_ok=True)
    return evidence


def _write_graph(
    settings: Export, name: str, gates: Gates, variant: Precision, partial: Path
) -> tuple[OnnxRunner, list[dict[str, Any]]]:
    """Write one form of a graph; returns it opened, and the evidence that it passed its gates."""
    spec = gates.spec
    file, raw = partial / spec.file(variant), partial / spec.file("fp32")
    made = make_variant(variant, raw, file, lambda: gates.calibration, settings.calibration, settings.provider)
    with runnable(file, variant, settings.provider) as opened:
        runner = open_onnx(opened, usable_threads(), settings.provider)
    passed = gates.check(f"{name} {variant} ({file.name})", variant, file, runner)
    return runner, [proof | made for proof in passed]


def _of_parent(proof: Mapping[str, Any]) -> dict[str, Any]:
    """Evidence of the fp32 graph where it is not shipped: what was found, on which bytes, but no file to look for."""
    named = {key: value for key, value in proof.items() if key not in _NAMES_OF_FILES}
    return {"what": f"parent_{proof['what']}", "parent_sha256": proof["sha256"], **named}


def _choose_forms(
    name: str, spec: IoSpec, settings: Export, documents: Documents, folder: Path, make: MakeForm
) -> list[dict[str, Any]]:
    """Try every form that there is, say what became of each, and return the evidence of those worth having."""
    proofs: dict[Precision, list[dict[str, Any]]] = {}
    timed, inputs = timed_inputs(documents, spec)

    def attempt(variant: Precision) -> Form:
        check_tried(name, spec, variant, settings.provider)
        files = [folder / file for file in spec.files(variant)]
        proofs[variant] = make(variant)
        again = lambda: open_onnx_graphs(files, spec, usable_threads(), settings.provider)  # noqa: E731
        return measure_form(variant, proofs[variant], again, inputs, sum(map(size_mib, files)))

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
    check_links(source)
    for file in _companions(source):
        shutil.copyfile(file, target / file.name)
    _name_tokenizer(target / "tokenizer_config.json")


def _name_tokenizer(file: Path) -> None:
    """Call a tokenizer of transformers 5's general class by its older name, which transformers 4 knows, too."""
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if config.get("tokenizer_class") == "TokenizersBackend":
        write_json(file, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def check_links(source: Path) -> None:
    """UserError for a link that leads out of a model's folder, as a private file would be copied into the export.

    Those of the hub's cache may lead to its own blobs: MODEL/snapshots/REVISION/FILE to MODEL/blobs/HASH.
    """
    folder = source.resolve()
    within = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    for file in _companions(source):
        if not any(file.resolve().is_relative_to(one) for one in within):
            raise UserError(
                f"{file} is a link to {file.resolve()}", "files of the model's own folder", "copy the file itself there"
            )


def _companions(source: Path) -> list[Path]:
    found = [file for pattern in _BESIDE for file in source.glob(pattern)]
    return [file for file in found if not any(file.match(unwanted) for unwanted in _NOT_BESIDE)]


def _tell(form: str, folder: Path, evidence: list[dict[str, Any]]) -> None:
    said = []
    for proof in evidence:
        found = proof["metrics"]
        if "kept" in found:
            said.append(
                f"{found['metric']} {found['value']:.4g}, {found['kept']:.2%} of the source's quality "
                f"({found['kept_low']:.2%} to {found['kept_high']:.2%})"
            )
        else:
            said.append(
                f"({proof['file']}): {size_mib(folder / proof['file']):.1f} MiB; parity holds in {found['cases']} "
                f"cases: max_abs {found['max_abs']:.2g}, relative_rms {found['relative_rms']:.2g}, top-1 "
                f"{found['top1']:.2%}"
            )
    Console(highlight=False).print(f"{form} {'; '.join(said)}", soft_wrap=True)


if __name__ == "__main__":
    stage_main("export")

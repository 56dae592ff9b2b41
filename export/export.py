"""The export stage: model folders to ONNX folders, in each form that the recipe names, that passed the gates.
Tracing, quantizing and comparing are done by the modules it wires together here.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from export.cases import Documents, load_documents
from export.files import data_file, size_mib
from export.gates import Gates
from export.io_spec import IoSpec, read_spec
from export.runners import open_onnx, usable_threads
from export.to_onnx import export_graph, load_model
from export.variants import check_variants, make_variant
from trainer.__main__ import stage_main
from trainer.artifact import content_hash, staging, write_artifact
from trainer.config import Recipe
from trainer.errors import GateFailed, UserError
from trainer.export_config import Export
from trainer.recipe_file import recipe_hash, require_section

# What a server needs beside the graph: everything of a transformers folder that is not weights or our own records.
_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")
_NOT_BESIDE = ("artifact.json", "*.safetensors.index.json", "*.bin.index.json", "trainer_state.json", "README*")


def run(recipe: Recipe) -> None:
    """Export every model of the recipe to `<run_dir>/export/<name>`; GateFailed if one differs from its source."""
    require_section(recipe, "export")
    assert recipe.export is not None
    models = recipe.exported_models()
    if not models:
        raise UserError("there is no model to export", "pretrain, distill or export.models", "name one in the recipe")
    for name, folder in models.items():  # refuse before the first model is worked on
        check_variants(name, read_spec(folder), recipe.export)
    for name, folder in models.items():
        try:
            export_model(recipe, recipe.export, name, folder, load_documents(recipe, folder))
        except GateFailed as failure:
            search = "`lmworks verify export RECIPE --bisect` names the node at which the form departs"
            raise GateFailed(str(failure), do=search) from None


def export_model(recipe: Recipe, settings: Export, name: str, folder: Path, documents: Documents) -> Path:
    """Write the ONNX folder of one model; returns it. On any failure nothing is left behind.

    `documents` are token ids of real text, which the parity gate runs on.
    """
    spec = read_spec(folder)
    gates = [Gates(folder, part, settings, documents, recipe.seed) for part in spec.parts]
    target = recipe.stage_dir("export") / name
    with staging(target) as partial:
        evidence = [proof for each in gates for proof in _export_graph(settings, name, folder, each, partial)]
        copy_companions(folder, partial)
        write_artifact(
            partial,
            "onnx",
            recipe_sha256=recipe_hash(recipe),
            parents={"model": content_hash(folder)},
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


def _export_graph(settings: Export, name: str, folder: Path, gates: Gates, partial: Path) -> Iterator[dict[str, Any]]:
    """Write one graph of a model in all its forms; yields the evidence that they passed."""
    spec = gates.spec
    raw = partial / spec.file("fp32")
    export_graph(load_model(folder, spec), spec, raw, settings.opset)
    for variant in settings.variants:
        file = partial / spec.file(variant)
        made = make_variant(variant, raw, file, gates.calibration, settings.calibration)
        what = f"{name} {variant} ({file.name})"
        passed = gates.check(what, variant, file, open_onnx(file, usable_threads(), settings.provider))
        _tell(what, file, passed)
        yield from (proof | made for proof in passed)
    if "fp32" not in settings.variants:
        raw.unlink()
        data_file(raw).unlink(missing_ok=True)


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


def _tell(what: str, file: Path, evidence: list[dict[str, Any]]) -> None:
    parity = evidence[0]["metrics"]
    said = (
        f"{what}: {size_mib(file):.1f} MiB; parity holds in {parity['cases']} cases: max_abs "
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

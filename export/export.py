"""The export stage: model folders to ONNX folders that passed the parity gate, fp32 and int8.
Tracing, quantizing and comparing are done by the modules it wires together here.
"""

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from export.cache import cache_cases
from export.cases import Documents, load_documents, make_cases
from export.io_spec import read_spec
from export.parity import check_parity
from export.quantize import quantize
from export.runners import ONNX_FILES, open_onnx, open_torch, usable_threads
from export.to_onnx import export_graph, load_model
from trainer.__main__ import stage_main
from trainer.artifact import content_hash, hash_file, staging, write_artifact
from trainer.config import Recipe
from trainer.environment import launch_command
from trainer.errors import UserError
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
    for folder in models.values():
        read_spec(folder)  # refuse before the first model is worked on
    for name, folder in models.items():
        export_model(recipe, recipe.export, name, folder, load_documents(recipe, folder))


def export_model(recipe: Recipe, settings: Export, name: str, folder: Path, documents: Documents) -> Path:
    """Write the ONNX folder of one model; returns it. On any failure nothing is left behind.

    `documents` are token ids of real text, which the parity gate runs on.
    """
    spec = read_spec(folder)
    threads = usable_threads()
    cases = make_cases(documents, spec, settings.parity.shapes, settings.parity.max_length, recipe.seed)
    source = open_torch(folder, threads)
    if spec.cache is not None:
        cases += cache_cases(documents, spec, source, settings.parity.max_length, recipe.seed)
    expected = [source.run(case.inputs) for case in cases]
    target = recipe.stage_dir("export") / name
    evidence = []
    with staging(target) as partial:
        raw = partial / ONNX_FILES["onnx_fp32"]
        export_graph(load_model(folder, spec), spec, raw, settings.opset)
        for variant in settings.variants:
            file = partial / ONNX_FILES[f"onnx_{variant}"]
            if variant == "int8":
                quantize(raw, file)
            what = f"{name} {variant} ({file.name})"
            tolerance = getattr(settings.parity, variant)
            passed = check_parity(what, spec, open_onnx(file, threads), cases, expected, tolerance)
            evidence.append(_evidence(variant, file, passed))
            _tell(what, file, passed)
        if "fp32" not in settings.variants:
            raw.unlink()
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
                "opset": settings.opset,
                "max_length": spec.max_length,
            },
        )
    return target


def copy_companions(source: Path, target: Path) -> None:
    """Copy config and tokenizer files of a model folder, so that transformers opens the exported one too."""
    for pattern in _BESIDE:
        for file in source.glob(pattern):
            if not any(file.match(unwanted) for unwanted in _NOT_BESIDE):
                shutil.copyfile(file, target / file.name)


def _evidence(variant: str, file: Path, passed: dict[str, Any]) -> dict[str, Any]:
    return {
        "what": f"parity_{variant}",
        "file": file.name,
        "sha256": hash_file(file),
        "command": launch_command(),
        **passed,
    }


def _tell(what: str, file: Path, passed: dict[str, Any]) -> None:
    metrics = passed["metrics"]
    Console(highlight=False).print(
        f"{what}: {file.stat().st_size / 2**20:.1f} MiB; parity holds in {metrics['cases']} cases: max_abs "
        f"{metrics['max_abs']:.2g}, relative_rms {metrics['relative_rms']:.2g}, top-1 {metrics['top1']:.2%}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    stage_main("export")

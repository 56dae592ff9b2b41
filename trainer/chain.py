"""The `run` verb: all stages of a recipe in order, leaving out those whose recipe and inputs did not change.
It knows the order of the stages and nothing of what they do."""

import hashlib
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer.artifact import ARTIFACT_FILE, content_hash, read_artifact, versions, write_json
from trainer.config import Recipe
from trainer.errors import UserError

# Stage, its module, what it leaves behind, the stages whose results it reads.
STAGES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "prepare": ("trainer.prepare", ("prepare/data", "prepare/tokenizer"), ()),
    "pretrain": ("trainer.pretrain", ("pretrain/model",), ("prepare",)),
    "distill": ("trainer.distill", ("distill/model",), ("prepare", "pretrain")),
    "export": ("export.export", ("export",), ("prepare", "pretrain", "distill")),
    "bench": ("export.bench", ("bench",), ("prepare", "pretrain", "distill", "export")),
}


def run(recipe: Recipe) -> None:
    """Run the chain, then the report. A stage is skipped if nothing that it depends on changed since it finished."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "`lmworks run` was started as several ranks",
            "one process for the chain",
            "launch a training stage by itself: accelerate launch -m trainer.pretrain RECIPE",
        )
    console = Console(stderr=True)
    record = _read(recipe)
    for stage, (module, _, _) in STAGES.items():
        if getattr(recipe, stage) is None:
            continue
        key = stage_key(recipe, stage)
        if record.get(stage, {}).get("key") == key and _is_there(recipe, stage):
            console.print(f"{stage}: up to date", highlight=False)
            record[stage]["skipped"] = True
        else:
            console.rule(stage)
            began = time.perf_counter()
            importlib.import_module(module).run(recipe)
            seconds = round(time.perf_counter() - began, 3)
            record[stage] = {"key": stage_key(recipe, stage), "seconds": seconds, "skipped": False}
        write_json(recipe.run_dir / "chain.json", {"stages": record})
    importlib.import_module("export.report").run(recipe)


def stage_key(recipe: Recipe, stage: str) -> str:
    """Hash of all that a stage's result depends on: its section, the seed, versions, and its inputs' contents."""
    section = getattr(recipe, stage).model_dump(mode="json")
    if stage == "distill" and recipe.pretrain is not None:
        section["inherited"] = recipe.pretrain.model_dump(mode="json", include={"objective", "data"})
    inputs = [_content(recipe.run_dir / folder) for parent in STAGES[stage][2] for folder in STAGES[parent][1]]
    inputs += [[content_hash(folder)] for folder in _named_folders(recipe, stage) if folder.is_dir()]
    text = json.dumps([section, recipe.seed, versions(), inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _named_folders(recipe: Recipe, stage: str) -> list[Path]:
    """Model folders that the recipe itself names, instead of taking an earlier stage's."""
    if stage == "pretrain" and recipe.pretrain and recipe.pretrain.model.init_from:
        return [recipe.pretrain.model.init_from]
    if stage == "distill" and recipe.distill and recipe.distill.teacher:
        return [recipe.distill.teacher]
    return list(recipe.exported_models().values()) if stage in ("export", "bench") else []


def _content(folder: Path) -> list[str]:
    """Content hashes of the artifacts at `folder` or right below it; none where the stage did not run."""
    found = [
        path.parent for path in (folder / ARTIFACT_FILE, *sorted(folder.glob(f"*/{ARTIFACT_FILE}"))) if path.is_file()
    ]
    return [read_artifact(artifact)["content_sha256"] for artifact in found]


def _is_there(recipe: Recipe, stage: str) -> bool:
    folders = [recipe.run_dir / folder for folder in STAGES[stage][1]]
    return all(_content(folder) or (folder / "report.json").is_file() for folder in folders)


def _read(recipe: Recipe) -> dict[str, Any]:
    path = recipe.run_dir / "chain.json"
    return json.loads(path.read_text())["stages"] if path.is_file() else {}

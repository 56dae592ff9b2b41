"""What a submitted job must not lose to later changes: the recipe, lmworks' own code, the list of what is installed.
All of it lies in `<run_dir>/slurm/`; the code is what a requeued job still runs when the checkout has moved on."""

import hashlib
import shutil
from importlib import metadata
from pathlib import Path

from trainer.artifact import write_json, write_text
from trainer.config import Recipe
from trainer.engine.zero import load_zero
from trainer.environment import git_state
from trainer.recipe_file import dump_recipe

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("trainer", "export", "slurm", "deepspeed_configs")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")


def code_name() -> str:
    """`code-` and a hash of lmworks' files."""
    digest = hashlib.sha256()
    for path in _files():
        digest.update(f"{path.relative_to(_ROOT).as_posix()}\n".encode() + path.read_bytes())
    return f"code-{digest.hexdigest()[:12]}"


def freeze(folder: Path, recipes: dict[str, Recipe], code: Path) -> None:
    """Write recipes (by file name), the DeepSpeed JSONs that they name by path, a copy of the code and
    environment.json into `folder`."""
    for name, recipe in recipes.items():
        write_text(folder / name, dump_recipe(_with_own_configs(recipe, folder)))
    if not code.is_dir():
        partial = code.with_name(f"{code.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for package in _PACKAGES:
            shutil.copytree(_ROOT / package, partial / package, ignore=_LEFT_OUT)
        partial.rename(code)
    installed = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    about = {"code": code.name, "git": git_state(_ROOT), "installed": dict(sorted(installed.items()))}
    write_json(folder / "environment.json", about)


def _with_own_configs(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with each DeepSpeed JSON of the user's replaced by a copy in `folder`."""
    changed = {}
    for stage in ("pretrain", "distill"):
        section = getattr(recipe, stage)
        if section is None or section.engine.zero is None:
            continue
        load_zero(section.engine.zero)  # a mistake is said now, not when the job starts
        if not Path(section.engine.zero).is_file():
            continue
        content = Path(section.engine.zero).read_bytes()
        copy = folder / f"deepspeed-{hashlib.sha256(content).hexdigest()[:12]}.json"
        write_text(copy, content.decode("utf-8"))
        engine = section.engine.model_copy(update={"zero": str(copy)})
        changed[stage] = section.model_copy(update={"engine": engine})
    return recipe.model_copy(update=changed)


def _files() -> list[Path]:
    found = [path for package in _PACKAGES for path in (_ROOT / package).rglob("*") if path.is_file()]
    return sorted(path for path in found if "__pycache__" not in path.parts)

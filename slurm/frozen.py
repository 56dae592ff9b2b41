"""What a submitted job must not lose to later changes: the recipe, lmworks' own code, the list of what is installed.
All of it lies in `<run_dir>/slurm/`; the code is what a requeued job still runs when the checkout has moved on."""

import hashlib
import shutil
from importlib import metadata
from pathlib import Path

from trainer.artifact import write_json, write_text
from trainer.environment import git_state

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("trainer", "export", "slurm", "deepspeed_configs")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")


def code_name() -> str:
    """`code-` and a hash of lmworks' files."""
    digest = hashlib.sha256()
    for path in _files():
        digest.update(f"{path.relative_to(_ROOT).as_posix()}\n".encode() + path.read_bytes())
    return f"code-{digest.hexdigest()[:12]}"


def freeze(folder: Path, recipes: dict[str, str], code: Path) -> None:
    """Write recipes (file name to text), a copy of the code and environment.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in recipes.items():
        write_text(folder / name, text)
    if not code.is_dir():
        partial = code.with_name(f"{code.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for package in _PACKAGES:
            shutil.copytree(_ROOT / package, partial / package, ignore=_LEFT_OUT)
        partial.rename(code)
    installed = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    about = {"code": code.name, "git": git_state(_ROOT), "installed": dict(sorted(installed.items()))}
    write_json(folder / "environment.json", about)


def _files() -> list[Path]:
    found = [path for package in _PACKAGES for path in (_ROOT / package).rglob("*") if path.is_file()]
    return sorted(path for path in found if "__pycache__" not in path.parts)

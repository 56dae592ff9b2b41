"""Checkpoints that are whole or not there: which one to resume from, writing a new one, keeping the last few.
What is inside is the engine's business."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.artifact import hash_file, staging, sync_folder, write_json, write_text
from trainer.config import Training
from trainer.engine.engine import Engine
from trainer.errors import UserError

_MARKER, _LATEST = "COMMITTED", "LATEST"

# Keys that may change between two attempts at one run: they move no sample and no number (micro_batch_size, attention,
# cross_entropy: up to the rounding of another order of summation).
_FREE_KEYS = frozenset(
    {
        "micro_batch_size",
        "gradient_checkpointing",
        "compile",
        "attention",
        "cross_entropy",
        "eval_every_steps",
        "eval_sequences",
        "log_every_steps",
        "save_every_steps",
        "keep_last",
        "resume",
    }
)


def run_identity(stage: Training, seed: int, inputs: dict[str, str]) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued: the stage's settings, the seed, hashes of its inputs."""
    settings = {key: value for key, value in stage.model_dump(mode="json").items() if key not in _FREE_KEYS}
    return _flat({**settings, "seed": seed, "inputs": inputs})


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that was loaded."""

    step: int
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in `folder`/step-<8 digits>/."""

    def __init__(
        self, folder: Path, training: Training, identity: dict[str, Any], engine: Engine, say: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._training = training
        self._identity = identity
        self._engine = engine
        self._say = say

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after optimizer step `step` (counted from 1)."""
        return step == self._training.max_steps or step % self._training.save_every_steps == 0

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint; it exists only once every file is on disk and hashed."""
        if self._engine.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
            with staging(self._path(step)) as partial:
                self._engine.save(partial)
                files = {path.name: hash_file(path) for path in sorted(partial.iterdir())}
                marker = {"step": step, "state": state, "identity": self._identity, "files": files}
                write_json(partial / _MARKER, marker)
            write_text(self._folder / _LATEST, self._path(step).name + "\n")
            self._forget_old()
        self._engine.wait()

    def resume(self) -> Resumed | None:
        """Load the newest whole checkpoint of this run; None if there is none, or the recipe says to start over."""
        chosen: Any = None
        if self._engine.is_main:
            try:
                chosen = self._newest_whole() if self._training.resume else self._set_aside()
            except UserError as error:
                chosen = error  # every rank must hear of it, or the others wait for ever
        chosen = self._engine.from_main(chosen)
        if isinstance(chosen, UserError):
            raise chosen
        if chosen is None:
            return None
        self._engine.load(self._path(chosen["step"]))
        self._say(f"resuming at step {chosen['step']} from {self._path(chosen['step'])}")
        return Resumed(chosen["step"], chosen["state"])

    def _newest_whole(self) -> dict[str, Any] | None:
        for path in reversed(self._paths()):
            fault = _fault(path)
            if fault is None:
                marker = json.loads((path / _MARKER).read_text())
                self._require_same_run(path, marker["identity"])
                return marker
            kept = _free_name(path.with_name(f"broken-{path.name}"))
            path.rename(kept)
            self._say(f"checkpoint {path} is broken ({fault}); kept as {kept.name}, taking an older one")
        return None

    def _require_same_run(self, path: Path, identity: dict[str, Any]) -> None:
        keys = sorted({*identity, *self._identity})
        changed = [key for key in keys if identity.get(key) != self._identity.get(key)]
        if changed:
            lines = [f"  {key}: {identity.get(key)!r} there, {self._identity.get(key)!r} now" for key in changed]
            raise UserError(
                "\n".join([f"checkpoint {path} belongs to another recipe:", *lines]),
                "the recipe that the checkpoints were made with",
                "restore those keys, choose another run_dir, or start over with <stage>.resume=false",
            )

    def _set_aside(self) -> None:
        if self._folder.exists():
            kept = _free_name(self._folder.with_name(f"{self._folder.name}-aside"))
            self._folder.rename(kept)
            self._say(f"starting at step 0; the checkpoints that were there are kept in {kept}")

    def _forget_old(self) -> None:
        for path in self._paths()[: -self._training.keep_last]:
            (path / _MARKER).unlink(missing_ok=True)  # first, so that a half-deleted one is never taken for whole
            sync_folder(path)
            shutil.rmtree(path)

    def _paths(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("step-*") if path.name.removeprefix("step-").isdigit())

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint folder; None if it is whole."""
    try:
        files = json.loads((path / _MARKER).read_text())["files"]
    except FileNotFoundError:
        return f"no {_MARKER} marker"
    except (ValueError, KeyError, TypeError):
        return f"its {_MARKER} marker is unreadable"
    for name, digest in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if hash_file(path / name) != digest:
            return f"{name} is not what was written"
    return None


def _free_name(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value})
    return flat

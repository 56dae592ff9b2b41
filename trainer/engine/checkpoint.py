"""Checkpoints that are whole or not there: which one to resume from, writing a new one, keeping the last few.
Every rank writes its own file and its hash; rank 0 commits when all are there. What is inside is the engine's business.
"""

import contextlib
import errno
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.artifact import free_name, hash_file, sync_file, sync_folder, sync_tree, write_json, write_text
from trainer.config import Training, deciding_settings
from trainer.engine.engine import Engine
from trainer.engine.fragments import FragmentFiles, write_file
from trainer.errors import DISK_FULL, OtherRun, UserError, as_os_error

_MARKER, _LATEST = "COMMITTED", "LATEST"
_POLL_S = 0.05
_REPORT_SHARE = 0.75  # of the collective timeout; the rest is for ranks that were done before rank 0. Assumed.


def run_identity(stage: Training, seed: int, inputs: dict[str, str]) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued: the stage's settings, the seed, hashes of its inputs."""
    return _flat({**deciding_settings(stage), "seed": seed, "inputs": inputs})


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
        self._writing: threading.Thread | None = None

    def save(self, step: int, state: dict[str, Any], in_background: bool = False) -> None:
        """Write a checkpoint; it exists only once every rank's file is on disk and hashed.

        in_background: only a copy in host memory is taken before this returns. A disk that is full is said, and the
        run goes on from the checkpoints that are there; any other failure to write ends it. A step that this run has
        saved already, as when a signal comes right after, is not written again.
        """
        self.finish()
        partial = self._path(step).with_name(f"{self._path(step).name}.partial")
        self._failure: OSError | None = None
        marker = {"step": step, "state": state | self._engine.state(), "identity": self._identity}
        if self._engine.ranks.from_main(self._engine.is_main and self._is_there(step, marker)):
            self._settled(f"looking at the checkpoint of step {step}")
            return
        if self._engine.is_main:
            self._make(partial)
        if not self._settled(f"beginning the checkpoint of step {step}"):
            return
        entries = self._engine.snapshot()
        self._writing = threading.Thread(target=self._write, args=(step, partial, entries, marker), name="checkpoint")
        self._writing.start()
        if not in_background:
            self.finish()

    def finish(self) -> None:
        """Wait for a checkpoint that is being written, on all ranks."""
        if self._writing is None:
            return
        self._writing.join()
        self._writing = None
        self._settled("finishing a checkpoint")

    def _settled(self, doing: str) -> bool:
        """Whether no rank failed to write. A full disk is said; UserError for any other failure. A collective."""
        failures = self._engine.ranks.gather(None if self._failure is None else str(self._failure))
        full = self._failure is None or self._failure.errno in DISK_FULL
        every_full = not self._engine.ranks.agree(not full, doing)
        said = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text is not None]
        if said and not every_full:
            raise UserError(
                f"the checkpoint could not be written ({'; '.join(said)})",
                "a folder that every rank can write, and in which rank 0 sees what the others write",
            )
        if said:
            self._say(f"checkpoint not written, going on without it ({'; '.join(said)}); the last one is kept")
        return not said

    def resume(self) -> Resumed | None:
        """Load the newest whole checkpoint of this run; None if there is none, or the recipe says to start over."""
        if self._training.resume:
            return self.load_newest()
        if self._engine.is_main:
            self._set_aside()
        self._engine.ranks.wait("setting checkpoints aside")
        return None

    def load_newest(self) -> Resumed | None:
        """Load the newest whole checkpoint; None if there is none at all. Broken ones are named and kept.

        Raises UserError if all are broken.
        """
        chosen = self._newest_whole()
        if chosen is None:
            return None
        path = self._path(chosen["step"])
        files = FragmentFiles([path / name for name in chosen["files"]])
        self._engine.restore(files, chosen["state"])
        self._say(f"resuming at step {chosen['step']} from {path}")
        return Resumed(chosen["step"], chosen["state"])

    def files(self, step: int) -> FragmentFiles:
        """The contents of the committed checkpoint of `step`; UserError if there is none."""
        marker = _marker(self._path(step))
        if isinstance(marker, str):
            raise UserError(f"{self._path(step)}: {marker}", "the checkpoint that was to be written there")
        return FragmentFiles([self._path(step) / name for name in marker["files"]])

    # ---- writing ---------------------------------------------------------------------------------------------------

    def _is_there(self, step: int, marker: dict[str, Any]) -> bool:
        """Whether this run has committed `step`. Its weights are these: they were saved, or loaded, at this step."""
        there = _marker(self._path(step))
        if isinstance(there, str) or there["identity"] != self._identity:
            return False
        try:
            if there["state"] != marker["state"]:  # a loss spike came after it: other batches will follow
                write_json(self._path(step) / _MARKER, marker | {"files": there["files"]})
        except OSError as error:
            self._failure = error
        return True

    def _make(self, partial: Path) -> None:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:  # a disk may have no room for a folder either
            self._failure = error

    def _write(self, step: int, partial: Path, entries: dict[str, Tensor], marker: dict[str, Any]) -> None:
        """What the background thread does: this rank's file, then on rank 0 the commit of all."""
        rank, world = self._engine.ranks.rank, self._engine.world
        name = f"rank-{rank:05d}-of-{world:05d}.safetensors"
        report: dict[str, Any]
        try:
            write_file(partial / name, entries)
            sync_file(partial / name)
            report = {"name": name, "sha256": hash_file(partial / name)}
        except Exception as error:  # safetensors has an exception of its own for what the disk says
            self._failure = as_os_error(error)
            report = {"error": str(error)}
            with contextlib.suppress(OSError):
                (partial / name).unlink(missing_ok=True)  # what follows finds room again
        if world > 1:
            self._hand_in(partial, rank, report)
        if rank == 0:
            try:
                reports = self._handed_in(partial, world) if world > 1 else [report]
                self._commit(step, partial, reports, marker)
            except Exception as error:  # a thread's is seen by nobody: the checkpoint would just be absent
                self._failure = as_os_error(error)
                shutil.rmtree(partial, ignore_errors=True)

    def _hand_in(self, partial: Path, rank: int, report: dict[str, Any]) -> None:
        """Tell rank 0 what became of this rank's file; an empty report, which a full disk still takes, means none."""
        path = partial / f"rank-{rank:05d}.json"
        try:
            write_json(path, report)
        except OSError as error:
            self._failure = error
            with contextlib.suppress(OSError):  # rank 0 misses it, and gives the checkpoint up
                path.touch()

    def _handed_in(self, partial: Path, world: int) -> list[dict[str, Any]]:
        """Every rank's report. OSError if one is not seen, in time for the ranks that wait for this one by then."""
        wait_s = _REPORT_SHARE * self._training.engine.collective_timeout_s
        deadline = time.monotonic() + wait_s
        paths = [partial / f"rank-{rank:05d}.json" for rank in range(world)]
        while (unseen := [path.name for path in paths if not path.is_file()]) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if unseen:
            raise OSError(errno.ETIMEDOUT, f"not seen by rank 0 within {wait_s:g} s: {', '.join(unseen)}", str(partial))
        written = [path.read_text() for path in paths]
        reports = [json.loads(text) if text else {"error": "no report"} for text in written]
        for path in paths:
            path.unlink(missing_ok=True)
        return reports

    def _commit(self, step: int, partial: Path, reports: list[dict[str, Any]], marker: dict[str, Any]) -> None:
        if any("error" in report for report in reports):
            shutil.rmtree(partial, ignore_errors=True)
            return
        files = {report["name"]: report["sha256"] for report in reports}
        write_json(partial / _MARKER, marker | {"files": files})
        sync_tree(partial)
        target = self._path(step)
        if target.exists():  # not a whole one, see `_is_there`
            (target / _MARKER).unlink(missing_ok=True)
            shutil.rmtree(target)
        partial.rename(target)
        sync_folder(self._folder)
        write_text(self._folder / _LATEST, target.name + "\n")
        self._forget_old()

    def _forget_old(self) -> None:
        for path in self._paths()[: -self._training.keep_last]:
            try:
                (path / _MARKER).unlink(missing_ok=True)  # first, so that a half-deleted one is never taken for whole
                sync_folder(path)
                shutil.rmtree(path)
            except OSError as error:  # on NFS, files that another process still has open
                self._say(f"old checkpoint {path} could not be removed ({error}); going on, the next save tries again")

    # ---- choosing --------------------------------------------------------------------------------------------------

    def _newest_whole(self) -> dict[str, Any] | None:
        """The marker of the newest checkpoint without a fault; ranks share the hashing, and agree."""
        ranks = self._engine.ranks
        broken: dict[Path, str] = {}
        for path in ranks.from_main(list(reversed(self._paths())) if ranks.is_main else None):
            marker = ranks.from_main(_marker(path) if ranks.is_main else None)
            faults = [marker] if isinstance(marker, str) else ranks.gather(self._fault(path, marker["files"]))
            fault = next((fault for fault in faults if fault is not None), None)
            if fault is None:
                assert isinstance(marker, dict)
                self._require_same_run(path, marker["identity"])
                if ranks.is_main:
                    self._keep_broken(broken)
                return marker
            broken[path] = fault
        if broken:  # one node with an old view of the folder is enough to see it so: nothing is touched
            lines = [f"  {path.name}: {fault}" for path, fault in broken.items()]
            raise UserError(
                "\n".join([f"every checkpoint in {self._folder} is broken:", *lines]),
                "a whole one to go on from",
                "see that every node sees those files and run again, or set them aside and begin at step 0 with "
                "<stage>.resume=false",
            )
        return None

    def _keep_broken(self, broken: dict[Path, str]) -> None:
        for path, fault in broken.items():
            kept = free_name(path.with_name(f"broken-{path.name}"))
            path.rename(kept)
            self._say(f"checkpoint {path} is broken ({fault}); kept as {kept.name}, taking an older one")

    def _fault(self, path: Path, files: dict[str, str]) -> str | None:
        """What is wrong with this rank's share of the files."""
        for number, (name, digest) in enumerate(files.items()):
            if number % self._engine.world != self._engine.ranks.rank:
                continue
            try:
                if hash_file(path / name) != digest:
                    return f"{name} is not what was written"
            except FileNotFoundError:
                return f"{name} is missing"
            except OSError as error:
                return f"{name} cannot be read: {error}"
        return None

    def _require_same_run(self, path: Path, identity: dict[str, Any]) -> None:
        keys = sorted({*identity, *self._identity})
        changed = [key for key in keys if identity.get(key) != self._identity.get(key)]
        if changed:
            lines = [f"  {key}: {identity.get(key)!r} there, {self._identity.get(key)!r} now" for key in changed]
            raise OtherRun(
                "\n".join([f"checkpoint {path} belongs to another recipe:", *lines]),
                "the recipe that the checkpoints were made with",
                "restore those keys, choose another run_dir, or start over with <stage>.resume=false",
            )

    def _set_aside(self) -> None:
        if self._folder.exists():
            kept = free_name(self._folder.with_name(f"{self._folder.name}-aside"))
            self._folder.rename(kept)
            self._say(f"starting at step 0; the checkpoints that were there are kept in {kept}")

    def _paths(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("step-*") if path.name.removeprefix("step-").isdigit())

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"


def _marker(path: Path) -> dict[str, Any] | str:
    """The marker of a checkpoint folder, or what is wrong with it."""
    try:
        marker = json.loads((path / _MARKER).read_text())
        if not isinstance(marker["files"], dict) or not {"step", "state", "identity"} <= set(marker):
            return f"its {_MARKER} marker is unreadable"
    except FileNotFoundError:
        return f"no {_MARKER} marker"
    except OSError as error:
        return f"its {_MARKER} marker cannot be read: {error}"
    except (ValueError, KeyError, TypeError):
        return f"its {_MARKER} marker is unreadable"
    return marker


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value})
    return flat

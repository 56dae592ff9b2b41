"""Folders that stages hand each other: written whole or not at all, with their lineage and evidence beside them.
What is inside a folder (weights, shards, graphs) is the business of whoever writes it."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.errors import Busy, UserError

ARTIFACT_FILE = "artifact.json"
# Written after the content was hashed, so they are no part of it: lineage must not change with a report.
NOT_CONTENT = frozenset({ARTIFACT_FILE, "README.md"})
_CHUNK_BYTES = 1 << 20
_TURN_S = 0.5
# What file systems say that cannot lock a folder: NFS (flock(2): it needs a file opened for writing), some Lustres.
_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_VERSIONED = ("lmworks", "torch", "transformers", "accelerate", "tokenizers", "onnx", "onnxruntime", "onnxruntime-gpu",
              "tensorrt", "tensorrt_rtx", "numpy")  # fmt: skip


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` when the block ends well, and vanishes when it does not.

    Everything is fsynced before the rename, so that a crash at any instant leaves the old folder or the new one.
    """
    recover(target)
    partial, previous = _beside(target, "partial"), _beside(target, "previous")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_tree(partial)
    if target.exists():
        target.rename(previous)
    partial.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def recover(target: Path) -> None:
    """Undo a replacement that a crash cut between its two renames."""
    previous = _beside(target, "previous")
    if previous.exists() and not target.exists():
        previous.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _fsync(Path(parent, name), os.O_RDONLY)
        sync_folder(Path(parent))


def sync_file(path: Path) -> None:
    """Flush one file to disk."""
    _fsync(path, os.O_RDONLY)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk (renames are durable only after this)."""
    _fsync(folder, os.O_RDONLY | os.O_DIRECTORY)


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_tree(folder: Path) -> str:
    """sha256 over names and hashes of all content files below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_CONTENT)
    lines = [f"{path.relative_to(folder).as_posix()} {hash_file(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_artifact(
    folder: Path,
    kind: str,
    *,
    recipe_sha256: str,
    parents: Mapping[str, str],
    evidence: list[dict[str, Any]] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Describe a finished folder: what it is, what it was made from (name to content hash), what was measured."""
    record = {
        "kind": kind,
        "content_sha256": hash_tree(folder),
        "recipe_sha256": recipe_sha256,
        "parents": dict(parents),
        "about": dict(about or {}),
        "evidence": evidence or [],
        "versions": versions(),
    }
    write_json(folder / ARTIFACT_FILE, record)


def read_artifact(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """The description of a folder that a stage finished; UserError if there is none, or it is of another kind."""
    recover(folder)
    path = folder / ARTIFACT_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is not there or not finished", "a folder with an artifact.json", "run its stage first"
        )
    record = json.loads(path.read_text(encoding="utf-8"))
    if kind is not None and record["kind"] != kind:
        raise UserError(f"{folder} is of kind {record['kind']!r}", f"kind {kind!r}", "give another path")
    return record


def add_evidence(folder: Path, entry: dict[str, Any]) -> None:
    """Add one measurement to a finished folder, replacing an earlier one of the same `what`."""
    record = read_artifact(folder)
    record["evidence"] = [old for old in record["evidence"] if old.get("what") != entry["what"]] + [entry]
    write_json(folder / ARTIFACT_FILE, record)


def content_hash(folder: Path) -> str:
    """Content hash of any folder: the recorded one of an artifact, else computed (a foreign model folder)."""
    if (folder / ARTIFACT_FILE).is_file():
        return read_artifact(folder)["content_sha256"]
    return hash_tree(folder)


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide what an artifact holds."""
    found = {}
    for name in _VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a stage's folder while the block runs; Busy if another process holds it, as a dead node may for a while.

    The lock is the system's own, on the folder itself: it leaves no file behind and ends with its process, however
    that ends. Of several ranks the first holds it for all. A file system without such locks (NFS) is left unguarded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Busy(
            f"another process is at work in {folder}", "one at a time", "let it end, or take another run_dir"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def in_turn(folder: Path, limit_s: float, doing: str) -> Iterator[None]:
    """Hold a folder while the block runs, after whoever holds it now, which is said once as what that one is `doing`;
    Busy if that takes longer than the limit."""
    until, told = time.monotonic() + limit_s, False
    while True:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(alone_in(folder))
            except Busy:
                if time.monotonic() > until:
                    raise
            else:
                yield
                return
        if not told:
            print(f"waiting for another lmworks, which is {doing} {folder}", file=sys.stderr)
            told = True
        time.sleep(_TURN_S)


def free_name(path: Path) -> Path:
    """The path itself, or with the first number behind it under which nothing is there."""
    candidates = [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f"{target.name}.{suffix}")


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

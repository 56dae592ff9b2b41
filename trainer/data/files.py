"""Which files the recipe's sources name, and a stamp of each by which a change is noticed without reading it.
What is in the files is `sources`' business; nothing here imports numpy or torch, so that a dry run can look, too."""

import glob
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from trainer.artifact import content_hash, hash_file
from trainer.config import Source
from trainer.data.bytestream import COMPRESSED_SUFFIXES
from trainer.errors import UserError

_ARCHIVE_SUFFIXES = frozenset({".tar", ".tgz", ".txz", ".tbz2", ".zip", ".7z", ".rar"})
_FOLDER_SUFFIXES = {"jsonl": {".jsonl", ".ndjson", ".json"}, "parquet": {".parquet", ".pq"}, "stdlib": {".py"}}
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


def source_names(sources: Sequence[Source]) -> list[str]:
    """Name of each source: its own, or type and position from 1. UserError if two are equal."""
    names = [source.name or f"{source.type}-{position}" for position, source in enumerate(sources, start=1)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two sources are named {name!r}", "a name of its own for each source", "set `name`")
    return names


def find_files(source: Source) -> list[Path]:
    """All files of a source, sorted by path, each once, whatever links lead to it.

    Folders are searched through, also where links lead to them; hidden files and folders in them are passed over, and
    for jsonl, parquet and stdlib also files of another suffix. A link to nothing is given out like a file, and reading
    it says so. Raises UserError for a path or pattern that gives no file, and for an archive.
    """
    if source.type == "stdlib":
        return _each_once(_folder_files(Path(sysconfig.get_paths()["stdlib"]), "stdlib"))
    found = _each_once([path for pattern in source.paths for path in _matches(pattern, source.type)])
    for path in found:
        if _is_archive(path):
            raise UserError(f"{path} is an archive of files", "text, plain or as .gz .xz .zst .bz2", "unpack it first")
    return found


def is_dangling(path: Path) -> bool:
    """Whether a path is a link to something that is not there, or to itself."""
    if not path.is_symlink() or path.exists():
        return False
    # A `**` that went around a loop of links gives paths with more links in them than the system follows.
    return not Path(os.path.realpath(path.parent), path.name).exists()


def stamp(path: Path) -> tuple[str, int, int]:
    """Path, bytes and time of the last change in ns of a file; of a link to nothing, the link's own."""
    seen = path.lstat() if is_dangling(path) else path.stat()
    return str(path), seen.st_size, seen.st_mtime_ns


def hash_tokenizer(path: Path) -> str:
    """Content hash of what `prepare.tokenizer.path` names: a folder, a file, or a file that is read with others."""
    if path.is_dir():
        return content_hash(path)
    if path.name == "tokenizer_config.json":
        return content_hash(path.parent)
    merges = path.with_name("merges.txt")
    return hash_file(path) + (hash_file(merges) if path.name == "vocab.json" and merges.is_file() else "")


def _matches(pattern: str, kind: str) -> list[Path]:
    # A file may be called `a[1].txt`: what exists under the very name is meant before what matches it.
    paths = [Path(pattern)] if Path(pattern).exists() else [Path(hit) for hit in glob.glob(pattern, recursive=True)]
    found = [path for path in paths if path.is_file() or is_dangling(path)]
    for folder in (path for path in paths if path.is_dir()):
        found += _folder_files(folder, kind)
    if not found:
        raise UserError(
            f"{pattern!r} matches no {kind} file", "a file, a folder with files, or a glob pattern", "check it"
        )
    return found


def _folder_files(folder: Path, kind: str) -> list[Path]:
    found, entered = [], {_identity(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        wanted = sorted(name for name in folders if not name.startswith(".") and not _is_foreign(name, kind))
        folders.clear()
        for name in wanted:  # each once: a link may lead back to where it lies
            identity = _identity(Path(parent, name))
            if identity not in entered:
                entered.add(identity)
                folders.append(name)
        found += [Path(parent, name) for name in names if not name.startswith(".") and _has_suffix(name, kind)]
    if kind == "stdlib" and not found:
        raise UserError(f"no Python sources in {folder}", "a Python with its standard library as source files")
    return [path for path in found if path.is_file() or is_dangling(path)]


def _each_once(paths: Sequence[Path]) -> list[Path]:
    """The shortest path to each file, sorted."""
    first: dict[object, Path] = {}
    for path in sorted(set(paths), key=lambda path: (len(path.parts), path)):
        first.setdefault(path if is_dangling(path) else _identity(path), path)
    return sorted(first.values())


def _identity(path: Path) -> tuple[int, int]:
    seen = path.stat()
    return seen.st_dev, seen.st_ino


def _is_archive(path: Path) -> bool:
    *_, before, last = ("", "", *(suffix.lower() for suffix in path.suffixes))
    return last in _ARCHIVE_SUFFIXES or (before == ".tar" and last in COMPRESSED_SUFFIXES)


def _is_foreign(folder_name: str, kind: str) -> bool:
    return kind == "stdlib" and folder_name in _NOT_STDLIB


def _has_suffix(name: str, kind: str) -> bool:
    path = Path(name)
    if kind != "parquet" and path.suffix.lower() in COMPRESSED_SUFFIXES:
        path = Path(path.stem)
    return kind not in _FOLDER_SUFFIXES or path.suffix.lower() in _FOLDER_SUFFIXES[kind]

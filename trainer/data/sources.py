"""Documents of the recipe's sources: finds their files and reads text, jsonl, parquet and the standard library.
It reports what it cannot read and leaves to `corpus` whether that stops the run, and which documents are kept."""

import glob
import io
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from trainer.config import Source
from trainer.data.bytestream import COMPRESSED_SUFFIXES, BrokenFileError, chunks, lines
from trainer.errors import UserError

_PARQUET_BATCH_ROWS = 1024
_ARCHIVE_SUFFIXES = frozenset({".tar", ".tgz", ".txz", ".tbz2", ".zip", ".7z", ".rar"})
_FOLDER_SUFFIXES = {"jsonl": {".jsonl", ".ndjson", ".json"}, "parquet": {".parquet", ".pq"}, "stdlib": {".py"}}
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One text, cleaned: UTF-8, newlines as \\n, no byte order mark."""

    utf8: bytes
    characters: int
    where: str


@dataclass(frozen=True)
class BadDocument:
    """Something that should have been a document: `reason` is one word to count by, `message` is for people."""

    reason: str
    where: str
    message: str


def source_names(sources: Sequence[Source]) -> list[str]:
    """Name of each source: its own, or type and position from 1. UserError if two are equal."""
    names = [source.name or f"{source.type}-{position}" for position, source in enumerate(sources, start=1)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two sources are named {name!r}", "a name of its own for each source", "set `name`")
    return names


def find_files(source: Source) -> list[Path]:
    """All files of a source, sorted by path, each once.

    Folders are searched through; hidden files and folders in them are passed over, and for jsonl, parquet and stdlib
    also files of another suffix. Raises UserError for a path or pattern that gives no file, and for an archive.
    """
    if source.type == "stdlib":
        return _folder_files(Path(sysconfig.get_paths()["stdlib"]), "stdlib")
    found = {path for pattern in source.paths for path in _matches(pattern, source.type)}
    for path in sorted(found):
        if _ARCHIVE_SUFFIXES.intersection(suffix.lower() for suffix in path.suffixes[-2:]):
            raise UserError(f"{path} is an archive of files", "text, plain or as .gz .xz .zst .bz2", "unpack it first")
    return sorted(found)


def read_file(source: Source, path: Path) -> Iterator[Document | BadDocument]:
    """The documents of one file in order. A damaged file gives those before the damage, then one BadDocument."""
    try:
        if source.type == "stdlib":
            yield _python_source(path)
        elif source.type == "jsonl":
            yield from _jsonl(path, source.text_field)
        elif source.type == "parquet":
            yield from _parquet(path, source.text_field)
        elif source.document == "file":
            yield _decoded(b"".join(chunks(path)), path, first_line=1)
        elif source.document == "line":
            yield from (_decoded(line, path, number) for number, line in lines(path) if line.strip())
        else:
            yield from (_decoded(block, path, number) for number, block in _blocks_of_lines(path))
    except BrokenFileError as broken:
        yield BadDocument(broken.reason, str(path), str(broken))


def _matches(pattern: str, kind: str) -> list[Path]:
    # A file may be called `a[1].txt`: what exists under the very name is meant before what matches it.
    paths = [Path(pattern)] if Path(pattern).exists() else [Path(hit) for hit in glob.glob(pattern, recursive=True)]
    found = [path for path in paths if path.is_file()]
    for folder in (path for path in paths if path.is_dir()):
        found += _folder_files(folder, kind)
    if not found:
        raise UserError(
            f"{pattern!r} matches no {kind} file", "a file, a folder with files, or a glob pattern", "check it"
        )
    return found


def _folder_files(folder: Path, kind: str) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_foreign(name, kind)]
        found += [Path(parent, name) for name in names if not name.startswith(".") and _has_suffix(name, kind)]
    if kind == "stdlib" and not found:
        raise UserError(f"no Python sources in {folder}", "a Python with its standard library as source files")
    return sorted(path for path in found if path.is_file())


def _is_foreign(folder_name: str, kind: str) -> bool:
    return kind == "stdlib" and folder_name in _NOT_STDLIB


def _has_suffix(name: str, kind: str) -> bool:
    path = Path(name)
    if kind != "parquet" and path.suffix.lower() in COMPRESSED_SUFFIXES:
        path = Path(path.stem)
    return kind not in _FOLDER_SUFFIXES or path.suffix.lower() in _FOLDER_SUFFIXES[kind]


def _python_source(path: Path) -> Document | BadDocument:
    """Python's own rule (PEP 263): UTF-8, unless a comment in the first two lines names another encoding."""
    raw = b"".join(chunks(path))
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return _document(raw.decode(encoding), str(path))
    except (SyntaxError, LookupError, UnicodeDecodeError) as error:
        return BadDocument("not_decodable", str(path), str(error))


def _blocks_of_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """First line number and bytes of each run of lines that are not blank."""
    start, block = 0, []
    for number, line in lines(path):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield start, b"\n".join(block)
            block = []
    if block:
        yield start, b"\n".join(block)


def _jsonl(path: Path, field: str) -> Iterator[Document | BadDocument]:
    for number, line in lines(path):
        if line.strip():
            yield _json_document(line, field, f"{path}:{number}")


def _json_document(line: bytes, field: str, where: str) -> Document | BadDocument:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadDocument("not_utf8", where, f"byte {error.start} of the line is not UTF-8")
    except (ValueError, RecursionError) as error:
        return BadDocument("not_json", where, f"the line is not JSON: {error}")
    if not isinstance(record, dict) or field not in record:
        return BadDocument("no_text_field", where, f"the line is no JSON object with a field {field!r}")
    return _text_value(record[field], field, where)


def _parquet(path: Path, field: str) -> Iterator[Document | BadDocument]:
    """Rows are counted from 1, as lines are."""
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise BrokenFileError("no_text_field", f"no column {field!r}; there are: {names}")
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    yield _parquet_value(value, field, f"{path}: row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = "corrupt_file" if row else "not_parquet"
        raise BrokenFileError(reason, f"cannot be read as parquet after row {row}: {error}") from None


def _parquet_value(value: pyarrow.Scalar, field: str, where: str) -> Document | BadDocument:
    try:
        return _text_value(value.as_py(), field, where)
    except UnicodeDecodeError as error:
        return BadDocument("not_utf8", where, f"byte {error.start} of {field!r} is not UTF-8")


def _text_value(value: object, field: str, where: str) -> Document | BadDocument:
    if not isinstance(value, str):
        return BadDocument("text_not_string", where, f"{field!r} holds {type(value).__name__}, not a string")
    return _document(value, where)


def _decoded(raw: bytes, path: Path, first_line: int) -> Document | BadDocument:
    try:
        return _document(raw.decode("utf-8"), f"{path}:{first_line}")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        return BadDocument("not_utf8", f"{path}:{line}", message)


def _document(text: str, where: str) -> Document | BadDocument:
    clean = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    try:
        return Document(clean.encode("utf-8"), len(clean), where)
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        return BadDocument("not_unicode", where, "the text holds half of a surrogate pair, such as \\ud83d")

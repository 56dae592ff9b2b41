"""Documents of the recipe's sources: reads text, jsonl, parquet and the standard library, file by file.
It reports what it cannot read and leaves to `corpus` whether that stops the run, and which documents are kept."""

import io
import json
import os
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from trainer.config import Source
from trainer.data.bytestream import BrokenFileError, chunks, lines
from trainer.data.files import is_dangling

_PARQUET_BATCH_ROWS = 1024


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


def read_file(source: Source, path: Path) -> Iterator[Document | BadDocument]:
    """The documents of one file in order. A damaged file gives those before the damage, then one BadDocument."""
    if is_dangling(path):
        yield BadDocument("dangling_link", str(path), f"a link to {os.readlink(path)}, which is not there")
        return
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

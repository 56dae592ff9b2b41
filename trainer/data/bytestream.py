"""Bytes and lines of plain and compressed files, read in small pieces, with every kind of damage noticed.
What the bytes mean (text, JSON) is left to `sources`."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from trainer.errors import UserError

_BLOCK_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"
# `zstd --long=31` writes windows of up to 2 GiB; the library refuses more than 128 MiB unless it is told.
_ZSTD_WINDOW_BYTES = 2**31

# The four libraries share one interface: decompress(bytes), eof, unused_data. The file objects built upon them do not
# behave alike: zstandard's reader ends a truncated file silently.
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".xz": lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ),
    ".bz2": bz2.BZ2Decompressor,
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj(),
}
COMPRESSED_SUFFIXES = frozenset(_DECOMPRESSORS)


class BrokenFileError(Exception):
    """A file that cannot be read to its end; `reason` is the word under which it is counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def chunks(path: Path) -> Iterator[bytes]:
    """The content of a file in pieces, decompressed by its suffix, without a leading byte order mark.

    Raises BrokenFileError where a compressed file is damaged or ends too early, after giving out what comes before.
    """
    make = _DECOMPRESSORS.get(path.suffix.lower())
    content = _blocks(path) if make is None else _decompressed(path, make)
    head: bytes | None = b""
    for piece in content:
        if head is None:
            yield piece
            continue
        head += piece
        if len(head) >= len(_BOM):
            yield head.removeprefix(_BOM)
            head = None
    if head:
        yield head


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of each line, without its line feed and a carriage return before it.

    Raises BrokenFileError as `chunks` does; a line that the damage cuts is not given out.
    """
    number, unfinished = 0, []
    for piece in chunks(path):
        *whole, rest = piece.split(b"\n")
        for part in whole:
            number += 1
            yield number, b"".join([*unfinished, part]).removesuffix(b"\r")
            unfinished = []
        unfinished.append(rest)  # a list, because adding to a long line byte string by byte string is quadratic
    last = b"".join(unfinished)
    if last:
        yield number + 1, last.removesuffix(b"\r")


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                yield block
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "a readable file", "mend or leave it out") from None


def _decompressed(path: Path, make: Callable[[], Any]) -> Iterator[bytes]:
    stream = make()
    for block in _blocks(path):
        data = block
        while data:
            if stream.eof:  # the file goes on with another stream, or with the zeros that xz and gzip allow behind one
                data = data.lstrip(b"\0")
                if not data:
                    break
                stream = make()
            yield _decompress(stream, data)
            data = stream.unused_data if stream.eof else b""
    if not stream.eof:
        raise BrokenFileError("truncated_file", "the compressed file ends too early")


def _decompress(stream: Any, data: bytes) -> bytes:
    try:
        return stream.decompress(data)
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError) as error:
        raise BrokenFileError("corrupt_file", f"the compressed file is damaged: {error}") from None

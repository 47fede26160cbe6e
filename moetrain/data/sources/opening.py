"""Opening a data file: regular files only, and what gzip, bzip2, xz or zstd made small is undone.

A compressed file is known by its first bytes, whatever its name: none of them begins a text in UTF-8.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa

from moetrain.errors import UserError
from moetrain.files import open_regular

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, MemoryError)


class Opened(NamedTuple):
    """``file`` gives the bytes as they were before compression; ``size`` is that of the file on disk."""

    file: IO[bytes]
    compression: str | None
    size: int


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """The file, open while the block lasts. Raises UserError, also for damage met while it is read."""
    compression = None
    with os.fdopen(open_regular(path), "rb") as raw:
        try:
            compression = next((c for c in _COMPRESSIONS if c.magic.match(raw.peek(16))), None)
            file = raw if compression is None else compression.undo(raw)
            yield Opened(file, compression and compression.name, os.fstat(raw.fileno()).st_size)
        except _DAMAGE as error:
            if compression is None or getattr(error, "errno", None):
                raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
            raise UserError(
                f"{path} cannot be decompressed: its {compression.name} data is cut or damaged ({error})"
            ) from error


class _Compression(NamedTuple):
    name: str
    magic: re.Pattern[bytes]
    undo: Callable[[IO[bytes]], IO[bytes]]


def _zstd(raw: IO[bytes]) -> IO[bytes]:
    stream: Any = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    return io.BufferedReader(stream, 2**16)


_COMPRESSIONS = (
    _Compression("gzip", re.compile(rb"\x1f\x8b"), lambda raw: cast(IO[bytes], gzip.GzipFile(fileobj=raw))),
    _Compression("bzip2", re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2File),
    _Compression("xz", re.compile(rb"\xfd7zXZ\0"), lzma.LZMAFile),
    _Compression("zstd", re.compile(rb"\x28\xb5\x2f\xfd"), _zstd),
)

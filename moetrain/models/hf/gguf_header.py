"""The header of a GGUF file: its metadata and where its tensors lie, every count checked against the file.

Source: the specification of GGUF in ggml-org/ggml, docs/gguf.md. All integers are little-endian.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain import files
from moetrain.errors import UserError

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
_SCALARS = {  # by the number of a value's type
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_ITEMS = 4_000_000  # of one array; the largest vocabularies have a tenth of it
_MAX_BYTES = 512 * files.MB  # of a header
_MAX_KEYS, _MAX_TENSORS, _MAX_DIMS, _MAX_NAME = 10_000, 100_000, 4, 1000


@dataclass(frozen=True)
class StoredTensor:
    """Numbers of one quantisation ``kind`` (ggml's number of it); ``shape`` has the rows first."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int  # of its first byte in the file
    nbytes: int


@dataclass(frozen=True)
class Header:
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path, block_sizes: dict[int, tuple[int, int]]) -> Header:
    """``block_sizes``: of each quantisation, how many numbers a block has and how many bytes.

    Raises UserError for a file that is damaged, or whose tensors overlap or do not lie within it.
    """
    descriptor = files.open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size < 24:
            raise _DamagedError(f"it has only {size} bytes")
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, min(size, _MAX_BYTES)).header(size, block_sizes)
    except (_DamagedError, OSError) as error:
        raise UserError(f"{path} is no intact GGUF file: {error}") from None
    finally:
        os.close(descriptor)


class _DamagedError(ValueError):
    """What is wrong with a file."""


class _Reader:
    """Reads one value after the other; ``end`` is where the header must have ended."""

    def __init__(self, data: mmap.mmap, end: int) -> None:
        self._data, self._end, self._at = data, end, 0

    def header(self, size: int, block_sizes: dict[int, tuple[int, int]]) -> Header:
        if self._take(4) != _MAGIC:
            raise _DamagedError("it does not begin with GGUF")
        version: int = self._scalar("<I")
        if version not in _VERSIONS:
            raise _DamagedError(f"its version is {version}; {' and '.join(map(str, _VERSIONS))} are known")
        num_tensors, num_keys = self._count(_MAX_TENSORS, "tensors"), self._count(_MAX_KEYS, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._name("a key")
            if key in metadata:
                raise _DamagedError(f"the key {key} is there twice")
            metadata[key] = self._value(self._scalar("<I"), key)
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _DamagedError(f"general.alignment={alignment!r} is no power of two")
        found = [self._tensor(block_sizes) for _ in range(num_tensors)]
        start = -(-self._at // alignment) * alignment
        tensors = {t.name: StoredTensor(t.name, t.shape, t.kind, start + t.start, t.nbytes) for t in found}
        if len(tensors) != len(found):
            raise _DamagedError("a tensor is there twice")
        _check_places(list(tensors.values()), start, alignment, size)
        return Header(metadata, tensors)

    def _take(self, count: int) -> bytes:
        stop = self._at + count
        if stop > self._end:
            raise _DamagedError(f"its header goes on after {self._end} bytes, where the file or sense ends")
        found, self._at = self._data[self._at : stop], stop
        return found

    def _scalar(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _count(self, limit: int, of: str) -> int:
        count: int = self._scalar("<Q")
        if count > limit:
            raise _DamagedError(f"it claims {count} {of}, and {limit} are possible")
        return count

    def _text(self, what: str) -> str:
        data = self._take(self._count(self._end - self._at, f"bytes of {what}"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _DamagedError(f"{what} is no UTF-8 text: {error}") from None

    def _name(self, what: str) -> str:
        name = self._text(what)
        if not name.isprintable() or len(name) > _MAX_NAME:
            raise _DamagedError(f"{what} is {name[:40]!r}, which is no name")
        return name

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._text(key)
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise _DamagedError(f"{key} is of type {kind}, which is not known")
        inner, count = self._scalar("<I"), self._count(_MAX_ITEMS, f"values of {key}")
        if inner == _STRING:
            return [self._text(f"a value of {key}") for _ in range(count)]
        if inner not in _SCALARS:
            raise _DamagedError(f"{key} is an array of type {inner}, which is not known")
        form = f"<{count}{_SCALARS[inner][1]}"
        return list(struct.unpack(form, self._take(struct.calcsize(form))))

    def _tensor(self, block_sizes: dict[int, tuple[int, int]]) -> StoredTensor:
        """``start`` counts from where the data begin."""
        name = self._name("the name of a tensor")
        dims: int = self._scalar("<I")
        if not 1 <= dims <= _MAX_DIMS:
            raise _DamagedError(f"{name} has {dims} dimensions, and 1 to {_MAX_DIMS} are possible")
        widths: list[int] = [self._scalar("<Q") for _ in range(dims)]
        kind: int = self._scalar("<I")
        start: int = self._scalar("<Q")
        if kind not in block_sizes:
            raise _DamagedError(f"{name} is of quantisation {kind}, which is not known")
        numbers, nbytes = block_sizes[kind]
        total = 1
        for width in widths:
            total *= width
        if total < 1 or widths[0] % numbers:
            raise _DamagedError(f"{name} is {widths}: not a whole number of blocks of {numbers}")
        return StoredTensor(name, tuple(reversed(widths)), kind, start, total // numbers * nbytes)


def _check_places(tensors: list[StoredTensor], start: int, alignment: int, size: int) -> None:
    """One after the other, each at the next multiple of ``alignment``, up to the end of the file.

    So llama.cpp writes them, and so it asks for them: of a gap, or of what is left over, a type or a length
    in the header is wrong, and numbers would be read of other bytes.
    """
    end, what = start, "the header"
    for tensor in sorted(tensors, key=lambda t: t.start):
        if tensor.start != (expected := -(-end // alignment) * alignment):
            raise _DamagedError(
                f"{tensor.name} begins at {tensor.start}, not at {expected}: {what} before it ends at {end}"
            )
        end, what = tensor.start + tensor.nbytes, tensor.name
        if end > size:
            raise _DamagedError(f"{tensor.name} ends at {end}, and the file has {size} bytes")
    if size - end >= alignment:
        raise _DamagedError(f"{size - end} bytes follow after its last tensor")

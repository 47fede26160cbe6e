"""Checks of a checkpoint's blocks, the stored pieces of its tensors: they tile them, stored plainly.

A block is one piece as torch.save writes it: a zip archive inside a ``.distcp`` file, with a small pickle and
the values. This module reads the archive's directory before torch opens it. The values must be uncompressed
and take exactly the bytes that dtype and shape need, and the pickle may name only what rebuilds a dense
tensor. So no block becomes larger in memory than it is on disk.
"""

from __future__ import annotations

import io
import itertools
import math
import pickletools
import struct
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

Box = tuple[Sequence[int], Sequence[int]]  # offsets and sizes

_CORNERS = 1 << 22  # of all blocks of a tensor; each costs about 200 bytes while it is counted
_SMALL = 1 << 16  # bytes of an archive besides its values: a pickle, names, alignment
_TAIL = struct.Struct(
    "<4sQHHII4Q 4sIQI 4s4HIIH"
)  # zip64 record, its locator, record: how torch ends an archive
_REBUILDS = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "collections OrderedDict"}
_NAMES = {"UntypedStorage", "DoubleStorage", "FloatStorage", "HalfStorage", "BFloat16Storage", "LongStorage"}
_NAMES |= {"IntStorage", "ShortStorage", "CharStorage", "ByteStorage", "BoolStorage"}
_NAMES |= {"ComplexFloatStorage", "ComplexDoubleStorage", "float8_e4m3fn", "float8_e5m2"}
_GLOBALS = _REBUILDS | {f"{module} {name}" for module in ("torch", "torch.storage") for name in _NAMES}


class BlockError(ValueError):
    """A block differs from what a save writes; the message says how."""


def tiles(shape: Sequence[int], blocks: Sequence[Box]) -> bool:
    """Whether ``blocks``, which lie inside ``shape``, cover each of its elements exactly once.

    The number of blocks over an element, differenced along every dimension, is a sum of signed corners. The
    difference determines the number, so blocks tile the shape just if their corners add up to the shape's.
    Takes time in proportion to their number. Raises BlockError if they have too many corners to count.
    """
    filled = [block for block in blocks if math.prod(block[1])]
    cut = [d for d in range(len(shape)) if any(sizes[d] != shape[d] for _, sizes in filled)]
    if len(filled) << len(cut) > _CORNERS:
        raise BlockError(
            f"{len(filled)} blocks, cut along {len(cut)} dimensions, are more than can be checked"
        )
    if not cut:
        return len(filled) == (1 if math.prod(shape) else 0)
    count: defaultdict[tuple[int, ...], int] = defaultdict(int)
    for weight, (offsets, sizes) in [(-1, ([0] * len(shape), shape)), *((1, block) for block in filled)]:
        for ends in itertools.product((0, 1), repeat=len(cut)):
            corner = tuple(offsets[d] + end * sizes[d] for d, end in zip(cut, ends, strict=True))
            count[corner] += -weight if sum(ends) % 2 else weight
    return not any(count.values())


def check_places(blocks: Iterable[tuple[str, int, _StorageInfo]], files: Mapping[str, int]) -> None:
    """Raise BlockError unless blocks (tensor, bytes of values, place) lie in their files and apart.

    ``files``: the size of each. No byte belongs to two blocks, so all tensors together are no larger than it.
    """
    ends: defaultdict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name, nbytes, place in blocks:
        begin, end = place.offset, place.offset + place.length
        if place.relative_path not in files:
            raise BlockError(
                f"a block of {name} lies in {place.relative_path}, which the manifest does not list"
            )
        if end > files[place.relative_path]:
            size = files[place.relative_path]
            raise BlockError(
                f"a block of {name} ends at byte {end} of {place.relative_path}, which has {size}"
            )
        if nbytes > place.length:
            raise BlockError(f"a block of {name} has {nbytes} bytes of values, but {place.length} are stored")
        ends[place.relative_path].append((begin, end, name))
    for file, found in ends.items():
        found.sort()
        for (_, end, name), (begin, _, other) in itertools.pairwise(found):
            if begin < end:
                raise BlockError(f"blocks of {name} and {other} share bytes of {file}")


class Slice(io.RawIOBase):
    """``length`` bytes of an open file from ``start`` on, as a file that zipfile can search."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = max(0, (0, self._at, self._length)[whence] + offset)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._start + self._at)
        part = memoryview(buffer)[: max(0, self._length - self._at)]
        count: int = self._file.readinto(part)  # type: ignore[attr-defined]  # as every binary file has it
        self._at += count
        return count


def check_block(stream: BinaryIO | Slice, dtype: torch.dtype, sizes: Sequence[int]) -> None:
    """Raise BlockError unless ``stream``, the bytes of a block, holds just values of ``dtype`` and ``sizes``.

    zipfile and torch must find the same directory, so the archive has to end as torch ends it.
    """
    length = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, length - _TAIL.size))
    tail = stream.read(_TAIL.size)
    if len(tail) < _TAIL.size:
        raise BlockError(f"{length} bytes are no archive of torch.save")
    *_, there, entries, size, start, _, _, place, _, _, _, _, _, few, short, near, comment = _TAIL.unpack(
        tail
    )
    marks = tail[:4], tail[56:60], tail[76:80]
    same = (few, short, near) == (min(entries, 0xFFFF), min(size, 2**32 - 1), min(start, 2**32 - 1))
    whole = there == entries and start + size == place == length - _TAIL.size
    if marks != (b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06") or comment or not (same and whole):
        raise BlockError("it does not end as an archive of torch.save does")
    if size > _SMALL:
        raise BlockError(f"its directory has {size} bytes")
    stream.seek(0)
    try:
        with zipfile.ZipFile(cast(BinaryIO, stream)) as archive:
            _check_records(archive, math.prod(sizes) * dtype.itemsize)
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, RuntimeError) as error:
        raise BlockError(f"it is no archive of torch.save: {error}") from None


def _check_records(archive: zipfile.ZipFile, nbytes: int) -> None:
    records = archive.infolist()
    if any(r.compress_type != zipfile.ZIP_STORED or r.compress_size != r.file_size for r in records):
        raise BlockError("its values are compressed")
    if len({r.filename.lower() for r in records}) < len(records):  # torch looks names up without case
        raise BlockError("a record of it is there twice")
    values = [r.file_size for r in records if r.filename.endswith("/data/0")]
    pickles = [r for r in records if r.filename.endswith("/data.pkl")]
    if sum(r.file_size for r in records) - sum(values) > _SMALL:
        raise BlockError("it holds more than its values")
    for record in records:
        if record.filename.endswith("/byteorder") and archive.read(record) != sys.byteorder.encode():
            raise BlockError(f"its bytes are in another order than {sys.byteorder}")
    for record in pickles:
        _check_pickle(archive.read(record))
    if values != [nbytes] or len(pickles) != 1:
        raise BlockError(f"it holds {sum(values)} bytes of values, not {nbytes}")


def _check_pickle(data: bytes) -> None:
    """torch runs it with weights_only, which lets it make other objects than tensors, of any size."""
    try:
        for code, argument, _ in pickletools.genops(data):
            named = code.name in ("GLOBAL", "INST")
            extended = code.name == "STACK_GLOBAL" or code.name.startswith("EXT")
            if extended or (named and argument not in _GLOBALS):
                raise BlockError(f"its pickle asks for {argument or code.name}")
    except BlockError:
        raise
    except (ValueError, IndexError):
        raise BlockError("its pickle is damaged") from None

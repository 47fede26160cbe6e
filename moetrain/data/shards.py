"""Token streams on disk: shards of tokens, document ends, byte counts, domains; and their manifest.

A store is one folder. Each stream ``s`` in it is the files ``s-tokens-00000.bin``, ... (uint16 or uint32),
``s-ends.bin`` (int64: the stream position just after each document), ``s-bytes.bin`` (int64: bytes of text
of each document) and ``s-domains.bin`` (uint16), all little-endian. Where documents train in part, a byte
for each token in ``s-masks-00000.bin``, ... says whether it does, and further columns sum that up.
``manifest.json`` records every file's size, sha256 and the sha256 of a sample of it; the manifest carries its
own digest.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moetrain.data.manifest import (
    FileEntry,
    Manifest,
    StreamEntry,
    column_name,
    damaged,
    mask_name,
    read_manifest,
    shard_name,
)
from moetrain.errors import UserError
from moetrain.files import open_regular

FULL_CHECK_BYTES = 10**9  # larger stores are checked by size and by a hash of three blocks of each file
_BLOCK = 2**20


def describe_file(path: Path) -> dict[str, Any]:
    descriptor = open_regular(path)
    try:
        return {
            "name": path.name,
            "size": os.fstat(descriptor).st_size,
            "sha256": _hash(descriptor, full=True),
            "sample_sha256": _hash(descriptor, full=False),
        }
    finally:
        os.close(descriptor)


def _hash(descriptor: int, full: bool) -> str:
    """Of the whole file, or of its first, middle and last block."""
    digest = hashlib.sha256()
    size = os.fstat(descriptor).st_size
    starts = range(0, size, _BLOCK)
    for start in starts if full else (0, max(0, size // 2 - _BLOCK // 2), max(0, size - _BLOCK)):
        digest.update(os.pread(descriptor, _BLOCK, start))
    return digest.hexdigest()


class StoredArray:
    """The numbers of one checked file, read when they are asked for.

    The file is not mapped into memory: where a mapped file is cut short, the process ends by a signal and
    without a word. Every read looks whether the file has changed since it was checked, and if so hashes it
    again: a new time of change may come from a backup, but other content is never trained on.
    """

    def __init__(self, folder: Path, entry: FileEntry, dtype: str, full: bool) -> None:
        """Check the file, all of it or a sample. Raises UserError that names it where it is damaged."""
        self._folder, self._entry, self._dtype = folder, entry, np.dtype(dtype)
        self._path = folder / entry.name
        try:
            self._descriptor = open_regular(self._path)
        except UserError as error:
            reason = str(error).removeprefix(f"cannot read {self._path}: ")
            raise damaged(folder, f"{self._path} cannot be read ({reason})") from None
        weakref.finalize(self, os.close, self._descriptor)
        self._checked = self._verify(full)

    def __len__(self) -> int:
        return self._entry.size // self._dtype.itemsize

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        start, stop, _ = part.indices(len(self))
        width = self._dtype.itemsize
        data = self._read(start * width, max(0, stop - start) * width)
        while self._status() != self._checked:
            self._checked = self._verify(full=True)
            data = self._read(start * width, max(0, stop - start) * width)
        return np.frombuffer(data, self._dtype)

    def _verify(self, full: bool) -> tuple[int, int, int]:
        """The state in which the content is as recorded."""
        status, entry = self._status(), self._entry
        if status[0] != entry.size:
            raise damaged(self._folder, f"{self._path} has {status[0]} bytes, not {entry.size}")
        try:
            found = _hash(self._descriptor, full)
        except OSError as error:
            raise self._unreadable(error) from error
        if found != (entry.sha256 if full else entry.sample_sha256):
            raise damaged(self._folder, f"{self._path} does not match its recorded hash")
        return status

    def _status(self) -> tuple[int, int, int]:
        try:
            status = os.fstat(self._descriptor)
        except OSError as error:
            raise self._unreadable(error) from error
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _read(self, start: int, size: int) -> bytes:
        """Fewer bytes than asked for where the file has shrunk."""
        pieces = []
        try:
            while size > 0 and (piece := os.pread(self._descriptor, size, start)):
                pieces.append(piece)
                start, size = start + len(piece), size - len(piece)
        except OSError as error:
            raise self._unreadable(error) from error
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _unreadable(self, error: OSError) -> UserError:
        return damaged(self._folder, f"{self._path} cannot be read ({error.strerror})")


class Shard(Protocol):
    """An array in memory, or a :class:`StoredArray`."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> npt.NDArray[Any]: ...


@dataclass(frozen=True)
class StreamMask:
    """Which tokens of a stream train, on disk until it is read.

    Of each document: how many do, the place of the first of them in it (past its end where none does), and
    the file and the row of the source that it came from.
    """

    shards: Sequence[Shard]
    trained_M: npt.NDArray[np.int64]
    firsts_M: npt.NDArray[np.int64]
    files_M: npt.NDArray[np.uint32]
    rows_M: npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenStream:
    """A written stream. N tokens, one of ``ends_M`` per document; tokens stay on disk until they are read.

    ``mask`` None: all of them train.
    """

    shards: Sequence[Shard]
    shard_tokens: int
    ends_M: npt.NDArray[np.int64]
    domains_M: npt.NDArray[np.uint16]
    num_tokens: int
    num_bytes: int
    counted_bytes: int
    mask: StreamMask | None = None

    @property
    def num_documents(self) -> int:
        return len(self.ends_M)

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens ``start`` to ``stop`` - 1, across shards where need be; ``stop`` is cut to the stream."""
        return self._read(self.shards, start, stop)

    def read_mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Whether each of the tokens trains that :meth:`read` gives."""
        if self.mask is None:
            return np.ones(max(0, min(stop, self.num_tokens) - start), bool)
        trains_N: npt.NDArray[np.bool_] = self._read(self.mask.shards, start, stop) != 0
        return trains_N

    def _read(self, shards: Sequence[Shard], start: int, stop: int) -> npt.NDArray[np.int64]:
        stop = min(stop, self.num_tokens)
        pieces = []
        while start < stop:
            shard, offset = divmod(start, self.shard_tokens)
            piece = shards[shard][offset : offset + stop - start]
            pieces.append(piece.astype(np.int64))
            start += len(piece)
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def open_store(folder: Path) -> tuple[Manifest, dict[str, TokenStream]]:
    """Check the folder against its manifest and open its streams. Raises UserError naming a damaged file."""
    manifest = read_manifest(folder)
    full = sum(file.size for file in manifest.files().values()) < FULL_CHECK_BYTES
    opened = {name: _open_stream(folder, name, manifest, full) for name in manifest.streams}
    return manifest, opened


def _open_stream(folder: Path, name: str, manifest: Manifest, full: bool) -> TokenStream:
    entry, files = manifest.streams[name], manifest.files()
    columns = {
        kind: StoredArray(folder, files[column_name(name, kind)], dtype, full)[:]
        for kind, dtype in entry.columns.items()
    }
    shards = [
        StoredArray(folder, files[shard_name(name, index)], manifest.dtype, full)
        for index in range(entry.shards)
    ]
    fault = _fault(manifest, entry, columns["ends"], columns["bytes"], columns["domains"])
    if fault is not None:
        raise damaged(folder, f"stream {name} {fault}")
    if full and manifest.tokenizer is not None:
        largest = max((int(shard[:].max()) for shard in shards), default=0)
        if largest >= manifest.tokenizer.vocab_size:
            raise damaged(folder, f"stream {name} has the token {largest} of {manifest.tokenizer.vocab_size}")
    return TokenStream(
        shards=shards,
        shard_tokens=len(shards[0]) if shards else 1,
        ends_M=columns["ends"],
        domains_M=columns["domains"],
        num_tokens=entry.tokens,
        num_bytes=entry.bytes,
        counted_bytes=entry.counted_bytes,
        mask=_open_mask(folder, name, manifest, columns, full) if entry.masked else None,
    )


def _open_mask(
    folder: Path, name: str, manifest: Manifest, columns: dict[str, npt.NDArray[Any]], full: bool
) -> StreamMask:
    files = manifest.files()
    masks = [
        StoredArray(folder, files[mask_name(name, index)], "u1", full)
        for index in range(manifest.streams[name].shards)
    ]
    lengths_M = np.diff(columns["ends"], prepend=0)
    trained_M, firsts_M = columns["trained"], columns["firsts"]
    if (trained_M < 0).any() or (trained_M + firsts_M > lengths_M).any() or (firsts_M < 0).any():
        raise damaged(folder, f"stream {name} has documents in which more tokens train than there are")
    return StreamMask(masks, trained_M, firsts_M, columns["files"], columns["rows"])


def _fault(
    manifest: Manifest,
    entry: StreamEntry,
    ends_M: npt.NDArray[np.int64],
    bytes_M: npt.NDArray[np.int64],
    domains_M: npt.NDArray[np.uint16],
) -> str | None:
    """What the columns of a stream do not agree on, in words."""
    if entry.tokens != (int(ends_M[-1]) if len(ends_M) else 0):
        return f"does not end at its {entry.tokens} tokens"
    if len(ends_M) and (ends_M[0] < 1 or (np.diff(ends_M) < 1).any()):
        return "has documents that end before they begin"
    if len(bytes_M) and (bytes_M.min() < 0 or int(bytes_M.sum()) != entry.bytes):
        return f"has documents of {int(bytes_M.sum())} bytes, not {entry.bytes}"
    if manifest.domains is not None and len(domains_M) and int(domains_M.max()) >= len(manifest.domains):
        return f"has the domain {int(domains_M.max())} of {len(manifest.domains)}"
    return None

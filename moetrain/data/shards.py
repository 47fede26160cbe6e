"""Token streams on disk: memory-mapped shards, document ends, byte counts, domains; and their manifest.

A store is one folder. Each stream ``s`` in it is the files ``s-tokens-00000.bin``, ... (uint16 or uint32),
``s-ends.bin`` (int64: the stream position just after each document), ``s-bytes.bin`` (int64: bytes of text
of each document) and ``s-domains.bin`` (uint16), all little-endian. ``manifest.json`` records every file's
size, sha256 and the sha256 of a sample of it; the manifest carries its own digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moetrain.data.documents import digest_of
from moetrain.errors import UserError

FORMAT = 2
SHARD_TOKENS = 256 * 2**20
FULL_CHECK_BYTES = 10**9  # larger stores are checked by size and by a hash of three blocks of each file
_BLOCK = 2**20
_COLUMNS = {"ends": "<i8", "bytes": "<i8", "domains": "<u2"}


class StreamWriter:
    """Appends documents to one stream; holds no more than the document at hand in memory."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._name, self._dtype, self._shard_tokens = folder, name, dtype, shard_tokens
        self._columns = {column: self._open(column) for column in _COLUMNS}
        self._shards: list[IO[bytes]] = []
        self.tokens = self.documents = self.bytes = self.counted_bytes = 0

    def _open(self, suffix: str) -> IO[bytes]:
        return (self._folder / f"{self._name}-{suffix}.bin").open("wb")

    def add(self, tokens_N: npt.NDArray[np.int64], num_bytes: int, counted_bytes: int, domain: int) -> None:
        """``counted_bytes`` is what the tokens' own lengths add up to, where ``num_bytes`` is the truth."""
        written = 0
        while written < len(tokens_N):
            room = -self.tokens % self._shard_tokens
            if room == 0:
                self._next_shard()
                room = self._shard_tokens
            piece = tokens_N[written : written + room]
            self._shards[-1].write(piece.astype(self._dtype).tobytes())
            written += len(piece)
            self.tokens += len(piece)
        self.documents += 1
        self.bytes += num_bytes
        self.counted_bytes += counted_bytes
        for column, value in (("ends", self.tokens), ("bytes", num_bytes), ("domains", domain)):
            self._columns[column].write(np.array(value, _COLUMNS[column]).tobytes())

    def _next_shard(self) -> None:
        if self._shards:
            self._shards[-1].close()
        self._shards.append(self._open(f"tokens-{len(self._shards):05d}"))

    def close(self) -> dict[str, Any]:
        """Flush to the disk and return the stream's entry in the manifest."""
        handles = [*self._shards, *self._columns.values()]
        for handle in handles:
            if not handle.closed:
                handle.flush()
                os.fsync(handle.fileno())
                handle.close()
        files = [describe_file(Path(handle.name)) for handle in handles]
        counts = ("tokens", "documents", "bytes", "counted_bytes")
        return {"shards": len(self._shards), "files": files} | {name: getattr(self, name) for name in counts}


def describe_file(path: Path) -> dict[str, Any]:
    return {
        "name": path.name,
        "size": path.stat().st_size,
        "sha256": _file_hash(path, full=True),
        "sample_sha256": _file_hash(path, full=False),
    }


def _file_hash(path: Path, full: bool) -> str:
    """Of the whole file, or of its first, middle and last block."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as handle:
        if full:
            while block := handle.read(_BLOCK):
                digest.update(block)
        else:
            for start in (0, max(0, size // 2 - _BLOCK // 2), max(0, size - _BLOCK)):
                handle.seek(start)
                digest.update(handle.read(_BLOCK))
    return digest.hexdigest()


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    content = {"format": FORMAT, **content}
    content["digest"] = _manifest_digest(content)
    (folder / "manifest.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _manifest_digest(content: dict[str, Any]) -> str:
    return digest_of(json.dumps({key: content[key] for key in content if key != "digest"}, sort_keys=True))


@dataclass(frozen=True)
class TokenStream:
    """A written stream, mapped into memory. N tokens, one of ``ends_M`` per document."""

    shards: list[npt.NDArray[Any]]
    shard_tokens: int
    ends_M: npt.NDArray[np.int64]
    bytes_M: npt.NDArray[np.int64]
    domains_M: npt.NDArray[np.uint16]
    num_tokens: int
    num_bytes: int
    counted_bytes: int

    @property
    def num_documents(self) -> int:
        return len(self.ends_M)

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens ``start`` to ``stop`` - 1, across shards where need be; ``stop`` is cut to the stream."""
        stop = min(stop, self.num_tokens)
        pieces = []
        while start < stop:
            shard, offset = divmod(start, self.shard_tokens)
            piece = self.shards[shard][offset : offset + stop - start]
            pieces.append(piece.astype(np.int64))
            start += len(piece)
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def open_store(folder: Path) -> tuple[dict[str, Any], dict[str, TokenStream]]:
    """Check the folder against its manifest and map its streams. Raises UserError naming a damaged file."""
    manifest = _read_manifest(folder)
    streams = manifest["streams"]
    total = sum(file["size"] for entry in streams.values() for file in entry["files"])
    for entry in streams.values():
        for file in entry["files"]:
            _check_file(folder, file, full=total < FULL_CHECK_BYTES)
    opened = {name: _open_stream(folder, name, manifest["dtype"], entry) for name, entry in streams.items()}
    return manifest, opened


def damaged(folder: Path, what: str) -> UserError:
    return UserError(f"damaged data: {what}; delete the folder {folder} and run again to rebuild it")


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        intact = manifest["format"] == FORMAT and manifest["digest"] == _manifest_digest(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, f"manifest.json cannot be read ({error})") from error
    if not intact:
        raise damaged(folder, "manifest.json does not match its own digest")
    return dict(manifest)


def _check_file(folder: Path, file: dict[str, Any], full: bool) -> None:
    path = folder / file["name"]
    try:
        size = path.stat().st_size
        if size != file["size"]:
            raise damaged(folder, f"{path} has {size} bytes, not {file['size']}")
        if _file_hash(path, full) != file["sha256" if full else "sample_sha256"]:
            raise damaged(folder, f"{path} does not match its recorded hash")
    except OSError as error:
        raise damaged(folder, f"{path} cannot be read ({error.strerror})") from error


def _open_stream(folder: Path, name: str, dtype: str, entry: dict[str, Any]) -> TokenStream:
    def column(suffix: str, kind: str) -> npt.NDArray[Any]:
        path = folder / f"{name}-{suffix}.bin"
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return np.zeros(0, kind)
        return np.memmap(path, kind, "r").view(np.ndarray)

    shards = [column(f"tokens-{index:05d}", dtype) for index in range(entry["shards"])]
    return TokenStream(
        shards=shards,
        shard_tokens=len(shards[0]) if shards else 1,
        ends_M=column("ends", _COLUMNS["ends"]),
        bytes_M=column("bytes", _COLUMNS["bytes"]),
        domains_M=column("domains", _COLUMNS["domains"]),
        num_tokens=entry["tokens"],
        num_bytes=entry["bytes"],
        counted_bytes=entry["counted_bytes"],
    )

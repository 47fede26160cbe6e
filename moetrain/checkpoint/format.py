"""What a checkpoint folder holds, as JSON: the tensors' metadata, the manifest, and the check against it.

A folder ``step_00000100`` contains ``__<rank>_0.distcp`` (the tensors that a rank wrote), ``metadata.json``
(which bytes of which file are which block of which tensor), ``extra.json`` (everything that is not a tensor)
and ``manifest.json``, written last: size and SHA-256 of every other file and, over its own text, of itself.
A folder without a manifest is not a checkpoint. Nothing here is a pickle and nothing read can run code.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from moetrain.checkpoint.blocks import BlockError, tiles
from moetrain.errors import UserError
from moetrain.files import read_bytes

FORMAT = "moetrain-checkpoint"
VERSION = 2  # 1 had gate and up, and queries, keys and values, in one matrix each
METADATA, EXTRA, MANIFEST = "metadata.json", "extra.json", "manifest.json"
FOLDER_NAME = re.compile(r"step_(\d{8,})")

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
        *(torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        *(torch.bool, torch.complex64, torch.complex128),
    )
}
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*")
_HASH = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 20
_LIMIT = 1 << 28  # bytes of one JSON file: a million blocks
_DIMENSIONS = 16


class FormatError(ValueError):
    """A checkpoint's JSON that this version does not understand; the message says which part."""


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: its name, size in bytes and SHA-256 (None: saved without hashing)."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Manifest:
    step: int
    files: tuple[FileRecord, ...]


def dtype_name(dtype: torch.dtype) -> str:
    """The name under which ``dtype`` is stored. Raises FormatError for one that a checkpoint cannot hold."""
    name = str(dtype).removeprefix("torch.")
    return name if name in _DTYPES else _refuse(f"dtype {name} cannot be stored")


def encode_metadata(metadata: Metadata) -> str:
    """DCP's metadata of a finished save as text. Raises FormatError for anything but dense tensors."""
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or entry.properties.layout != torch.strided:
            _refuse(f"{name} is not a dense tensor")
        tensors[name] = {
            "dtype": dtype_name(entry.properties.dtype),
            "shape": list(entry.size),
            "chunks": [_encode_chunk(name, chunk, metadata.storage_data) for chunk in entry.chunks],
        }
    return json.dumps({"format": FORMAT, "version": VERSION, "tensors": tensors}, sort_keys=True) + "\n"


def _encode_chunk(
    name: str, chunk: ChunkStorageMetadata, storage: dict[MetadataIndex, _StorageInfo]
) -> dict[str, Any]:
    info = storage[MetadataIndex(name, chunk.offsets)]
    if info.transform_descriptors:
        _refuse(f"{name} was written through a transform")
    return {
        "offsets": list(chunk.offsets),
        "sizes": list(chunk.sizes),
        "file": info.relative_path,
        "position": info.offset,
        "length": info.length,
    }


def decode_metadata(text: str | bytes) -> Metadata:
    """The inverse of :func:`encode_metadata`, strict: every key, type, bound and dtype name is checked."""
    document = _object(_parse(text), {"format", "version", "tensors"}, "metadata")
    _check_version(document)
    if not isinstance(document["tensors"], dict):
        _refuse("tensors is not an object")
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, value in document["tensors"].items():
        entry = _object(value, {"dtype", "shape", "chunks"}, name)
        dtype, shape = entry["dtype"], _sizes(entry["shape"], name)
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            _refuse(f"{name} has the unknown dtype {dtype!r}")
        if not isinstance(entry["chunks"], list):
            _refuse(f"{name}: chunks is not a list")
        chunks = []
        for item in entry["chunks"]:
            chunk, info = _decode_chunk(name, item, shape)
            index = MetadataIndex(name, chunk.offsets)
            if index in storage:
                _refuse(f"{name} has two blocks at {list(chunk.offsets)}")
            storage[index] = info
            chunks.append(chunk)
        if not _tiles(name, shape, chunks):
            _refuse(f"the blocks of {name} do not fill its shape {list(shape)}, each element once")
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=_DTYPES[dtype]), shape, chunks)
    return Metadata(state_dict_metadata=entries, storage_data=storage)


def _tiles(name: str, shape: torch.Size, chunks: list[ChunkStorageMetadata]) -> bool:
    try:
        return tiles(shape, [(chunk.offsets, chunk.sizes) for chunk in chunks])
    except BlockError as error:
        _refuse(f"{name}: {error}")


def _decode_chunk(name: str, value: Any, shape: torch.Size) -> tuple[ChunkStorageMetadata, _StorageInfo]:
    item = _object(value, {"offsets", "sizes", "file", "position", "length"}, f"a block of {name}")
    offsets, sizes = _sizes(item["offsets"], name), _sizes(item["sizes"], name)
    if not len(offsets) == len(sizes) == len(shape):
        _refuse(f"a block of {name} has another number of dimensions than {list(shape)}")
    if any(o + s > full for o, s, full in zip(offsets, sizes, shape, strict=True)):
        _refuse(f"a block of {name} at {list(offsets)} reaches beyond its shape {list(shape)}")
    info = _StorageInfo(_file_name(item["file"]), _size(item["position"], name), _size(item["length"], name))
    return ChunkStorageMetadata(offsets, sizes), info


def stored_blocks(metadata: Metadata) -> Iterator[tuple[str, int, _StorageInfo]]:
    """Of each block: its tensor, how many bytes its values take, and where they are stored."""
    entries: dict[str, Any] = dict(metadata.state_dict_metadata)
    for name, entry in entries.items():
        for chunk in entry.chunks:
            nbytes = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            yield name, nbytes, metadata.storage_data[MetadataIndex(name, chunk.offsets)]


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's only valid bytes: one flipped bit anywhere makes :func:`decode_manifest` refuse it."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "files": {f.name: {"size": f.size, "sha256": f.sha256} for f in manifest.files},
    }
    document["self"] = hashlib.sha256(_dump(document)).hexdigest()
    return _dump(document)


def decode_manifest(data: bytes) -> Manifest:
    document = _object(_parse(data), {"format", "version", "step", "files", "self"}, "manifest")
    _check_version(document)
    if not isinstance(document["files"], dict):
        _refuse("files is not an object")
    files = []
    for name, value in document["files"].items():
        entry = _object(value, {"size", "sha256"}, name)
        digest = entry["sha256"]
        if digest is not None and not (isinstance(digest, str) and _HASH.fullmatch(digest)):
            _refuse(f"{name} has no valid sha256")
        files.append(FileRecord(_file_name(name), _size(entry["size"], name), digest))
    manifest = Manifest(_size(document["step"], "step"), tuple(files))
    if encode_manifest(manifest) != data:
        _refuse("its own checksum differs")
    return manifest


def other_version(folder: Path) -> int | None:
    """The version of an intact manifest that another moetrain wrote; None for ours, or a damaged one."""
    try:
        document = _parse(read_file(folder, MANIFEST))
        version, checksum = document["version"], document.pop("self")
    except (FormatError, KeyError, TypeError, AttributeError):
        return None
    intact = document.get("format") == FORMAT and checksum == hashlib.sha256(_dump(document)).hexdigest()
    return version if intact and type(version) is int and version != VERSION else None


def read_manifest(folder: Path) -> Manifest:
    """Raises FormatError where it is missing, damaged, or of another step than the folder's name says."""
    if not (folder / MANIFEST).exists():
        _refuse("missing, so the checkpoint is incomplete")
    manifest = decode_manifest(read_file(folder, MANIFEST))
    named = FOLDER_NAME.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        _refuse(f"written for step {manifest.step}, so the folder was renamed")
    return manifest


def read_file(folder: Path, name: str) -> bytes:
    """The bytes of a checkpoint's JSON file. Raises FormatError where it is huge or cannot be read."""
    try:
        return read_bytes(folder / name, _LIMIT)
    except UserError as error:
        _refuse(str(error))


def verify(folder: Path, rank: int = 0, world: int = 1, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint, one line per file; an empty list means nothing.

    Rank ``rank`` of ``world`` checks its share of the files. ``hashes=False`` looks at names and sizes only.
    """
    try:
        manifest = read_manifest(folder)
    except FormatError as error:
        return [f"{MANIFEST}: {error}"]
    names = {record.name for record in manifest.files}
    problems = [f"{MANIFEST}: does not list {name}" for name in (METADATA, EXTRA) if name not in names]
    by_size = sorted(manifest.files, key=lambda record: (-record.size, record.name))
    for record in by_size[rank::world]:
        problem = _check_file(folder / record.name, record, hashes)
        if problem:
            problems.append(f"{record.name}: {problem}")
    return problems


def _check_file(path: Path, record: FileRecord, hashes: bool) -> str | None:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe may never end
            return "not a regular file"
        if (size := found.st_size) != record.size:
            return f"{size} bytes, not the {record.size} that were written"
        if hashes and record.sha256 is not None and hash_file(path) != record.sha256:
            return "its SHA-256 differs from the one recorded when it was written"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    block = bytearray(_BLOCK)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(view[:count])
    return digest.hexdigest()


def _dump(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode("ascii")


def _parse(data: str | bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        _refuse("not JSON")


def _check_version(document: dict[str, Any]) -> None:
    if document["format"] != FORMAT or document["version"] != VERSION:
        found = f"{document['format']!r} version {document['version']!r}"
        _refuse(f"written as {found}; this moetrain reads {FORMAT!r} version {VERSION}")


def _object(value: Any, keys: set[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != keys:
        _refuse(f"{where} must have exactly the keys {sorted(keys)}")
    return value


def _size(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        _refuse(f"{where}: {value!r:.40} is not a size")
    return value


def _sizes(value: Any, where: str) -> torch.Size:
    if not isinstance(value, list):
        _refuse(f"{where}: {value!r} is not a shape")
    if len(value) > _DIMENSIONS or math.prod(max(1, _size(item, where)) for item in value) >= 2**62:
        _refuse(f"{where}: {value!r:.80} is larger than any tensor")
    return torch.Size([_size(item, where) for item in value])


def _file_name(value: Any) -> str:
    if not isinstance(value, str) or not _FILE_NAME.fullmatch(value):
        _refuse(f"{value!r} is not a file name inside the checkpoint")
    return value


def _refuse(message: str) -> NoReturn:
    raise FormatError(message)

"""What a checkpoint folder holds, and the metadata of its tensors as JSON.

A folder ``step_00000100`` contains ``__<rank>_0.distcp`` (the tensors that a rank wrote), ``metadata.json``
(which bytes of which file are which block of which tensor), ``extra.json`` (everything that is not a tensor)
and ``manifest.json``, written last: size and SHA-256 of every other file and, over its own text, of itself.
A folder without a manifest is not a checkpoint. Nothing here is a pickle and nothing read can run code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
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
_LIMIT = 1 << 28  # bytes of one JSON file: a million blocks
_DIMENSIONS = 16


class FormatError(ValueError):
    """A checkpoint's JSON that this version does not understand; the message says which part."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name under which ``dtype`` is stored. Raises FormatError for one that a checkpoint cannot hold."""
    name = str(dtype).removeprefix("torch.")
    return name if name in _DTYPES else refuse(f"dtype {name} cannot be stored")


def encode_metadata(metadata: Metadata) -> str:
    """DCP's metadata of a finished save as text. Raises FormatError for anything but dense tensors."""
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or entry.properties.layout != torch.strided:
            refuse(f"{name} is not a dense tensor")
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
        refuse(f"{name} was written through a transform")
    return {
        "offsets": list(chunk.offsets),
        "sizes": list(chunk.sizes),
        "file": info.relative_path,
        "position": info.offset,
        "length": info.length,
    }


def decode_metadata(text: str | bytes) -> Metadata:
    """The inverse of :func:`encode_metadata`, strict: every key, type, bound and dtype name is checked."""
    document = as_object(parse(text), {"format", "version", "tensors"}, "metadata")
    check_version(document)
    if not isinstance(document["tensors"], dict):
        refuse("tensors is not an object")
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, value in document["tensors"].items():
        entry = as_object(value, {"dtype", "shape", "chunks"}, name)
        dtype, shape = entry["dtype"], _sizes(entry["shape"], name)
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            refuse(f"{name} has the unknown dtype {dtype!r}")
        if not isinstance(entry["chunks"], list):
            refuse(f"{name}: chunks is not a list")
        chunks = []
        for item in entry["chunks"]:
            chunk, info = _decode_chunk(name, item, shape)
            index = MetadataIndex(name, chunk.offsets)
            if index in storage:
                refuse(f"{name} has two blocks at {list(chunk.offsets)}")
            storage[index] = info
            chunks.append(chunk)
        if not _tiles(name, shape, chunks):
            refuse(f"the blocks of {name} do not fill its shape {list(shape)}, each element once")
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=_DTYPES[dtype]), shape, chunks)
    return Metadata(state_dict_metadata=entries, storage_data=storage)


def _tiles(name: str, shape: torch.Size, chunks: list[ChunkStorageMetadata]) -> bool:
    try:
        return tiles(shape, [(chunk.offsets, chunk.sizes) for chunk in chunks])
    except BlockError as error:
        refuse(f"{name}: {error}")


def _decode_chunk(name: str, value: Any, shape: torch.Size) -> tuple[ChunkStorageMetadata, _StorageInfo]:
    item = as_object(value, {"offsets", "sizes", "file", "position", "length"}, f"a block of {name}")
    offsets, sizes = _sizes(item["offsets"], name), _sizes(item["sizes"], name)
    if not len(offsets) == len(sizes) == len(shape):
        refuse(f"a block of {name} has another number of dimensions than {list(shape)}")
    if any(o + s > full for o, s, full in zip(offsets, sizes, shape, strict=True)):
        refuse(f"a block of {name} at {list(offsets)} reaches beyond its shape {list(shape)}")
    info = _StorageInfo(
        as_file_name(item["file"]), as_size(item["position"], name), as_size(item["length"], name)
    )
    return ChunkStorageMetadata(offsets, sizes), info


def stored_blocks(metadata: Metadata) -> Iterator[tuple[str, int, _StorageInfo]]:
    """Of each block: its tensor, how many bytes its values take, and where they are stored."""
    entries: dict[str, Any] = dict(metadata.state_dict_metadata)
    for name, entry in entries.items():
        for chunk in entry.chunks:
            nbytes = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            yield name, nbytes, metadata.storage_data[MetadataIndex(name, chunk.offsets)]


def read_file(folder: Path, name: str) -> bytes:
    """The bytes of a checkpoint's JSON file. Raises FormatError where it is huge or cannot be read."""
    try:
        return read_bytes(folder / name, _LIMIT)
    except UserError as error:
        refuse(str(error))


def parse(data: str | bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        refuse("not JSON")


def check_version(document: dict[str, Any]) -> None:
    if document["format"] != FORMAT or document["version"] != VERSION:
        found = f"{document['format']!r} version {document['version']!r}"
        refuse(f"written as {found}; this moetrain reads {FORMAT!r} version {VERSION}")


def as_object(value: Any, keys: set[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != keys:
        refuse(f"{where} must have exactly the keys {sorted(keys)}")
    return value


def as_size(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        refuse(f"{where}: {value!r:.40} is not a size")
    return value


def _sizes(value: Any, where: str) -> torch.Size:
    if not isinstance(value, list):
        refuse(f"{where}: {value!r} is not a shape")
    if len(value) > _DIMENSIONS or math.prod(max(1, as_size(item, where)) for item in value) >= 2**62:
        refuse(f"{where}: {value!r:.80} is larger than any tensor")
    return torch.Size([as_size(item, where) for item in value])


def as_file_name(value: Any) -> str:
    if not isinstance(value, str) or not _FILE_NAME.fullmatch(value):
        refuse(f"{value!r} is not a file name inside the checkpoint")
    return value


def refuse(message: str) -> NoReturn:
    raise FormatError(message)

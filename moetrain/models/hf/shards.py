"""Writing safetensors shards tensor by tensor: memory holds one tensor, whatever the size of a file.

The library's own writer takes a whole file's tensors at once. Source of the format: huggingface/safetensors,
README, "Format": 8 bytes of length, a JSON header, the bytes of all tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moetrain.models.hf.folder import INDEX, SINGLE
from moetrain.models.hf.tensors import TensorInfo, bytes_of, dtype_names


def write_shards(
    folder: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], Tensor], max_bytes: int
) -> dict[str, str]:
    """Write ``tensors`` in their order, in files of at most ``max_bytes`` (one tensor may be larger).

    ``read`` is asked for each name once, in order. Returns the SHA-256 of each tensor's bytes.
    """
    shards = _split(tensors, max_bytes)
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        hashes |= _write(folder / file, {name: tensors[name] for name in names}, read)
    if len(shards) > 1:
        total = sum(info.nbytes for info in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return hashes


def _split(tensors: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    return shards


def _write(file: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> dict[str, str]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, names = 0, dtype_names()
    for name, info in tensors.items():
        span = [position, position + info.nbytes]
        header[name] = {"dtype": names[info.dtype], "shape": list(info.shape), "data_offsets": span}
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8
    hashes = {}
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, info in tensors.items():
            tensor = read(name)
            if (tuple(tensor.shape), tensor.dtype) != (info.shape, info.dtype):
                raise ValueError(f"{name} is {tensor.dtype}{list(tensor.shape)}, not what was announced")
            data = bytes_of(tensor)
            stream.write(data)
            hashes[name] = hashlib.sha256(data).hexdigest()
        stream.flush()
        os.fsync(stream.fileno())
    return hashes

"""``manifest.json`` of a token store: its schema, its own digest, and what its numbers must agree on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from moetrain.data.documents import digest_of
from moetrain.errors import UserError
from moetrain.files import MB, parse_json, read_bytes

FORMAT = 2  # 1 had special tokens that text had made, and documents without a token
COLUMNS = {"ends": "<i8", "bytes": "<i8", "domains": "<u2"}
# Of documents that train in part: how many tokens do, the place of the first, file and row in the source.
MASK_COLUMNS = {"trained": "<i8", "firsts": "<i8", "files": "<u4", "rows": "<i8"}
_NAME = "manifest.json"
_LARGEST = 100 * MB  # a thousand shards of half a gigabyte take 0.3 MB

Count = Annotated[int, Field(ge=0, lt=2**62)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class FileEntry:
    name: str
    size: Count
    sha256: Sha256
    sample_sha256: Sha256


@dataclass(frozen=True)
class StreamEntry:
    shards: Count
    files: list[FileEntry]
    tokens: Count
    documents: Count
    bytes: Count
    counted_bytes: Count
    masked: bool = False  # a byte for each token says whether it trains

    @property
    def columns(self) -> dict[str, str]:
        return COLUMNS | MASK_COLUMNS if self.masked else COLUMNS


@dataclass(frozen=True)
class SourceEntry:
    name: str | None
    fingerprint: str


@dataclass(frozen=True)
class TokenizerEntry:
    fingerprint: str
    vocab_size: Count


@dataclass(frozen=True)
class Manifest:
    """What is stored. A store of tokens alone has neither sources nor a tokenizer."""

    format: Literal[2]
    dtype: Literal["<u2", "<u4"]
    streams: dict[Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")], StreamEntry]
    digest: Sha256
    sources: list[SourceEntry] | None = None
    tokenizer: TokenizerEntry | None = None
    val_fraction: float | None = None
    exceptions: list[int] | None = None
    domains: list[str] | None = None

    def files(self) -> dict[str, FileEntry]:
        return {file.name: file for entry in self.streams.values() for file in entry.files}


def shard_name(stream: str, index: int) -> str:
    return f"{stream}-tokens-{index:05d}.bin"


def mask_name(stream: str, index: int) -> str:
    return f"{stream}-masks-{index:05d}.bin"


def column_name(stream: str, column: str) -> str:
    return f"{stream}-{column}.bin"


def damaged(folder: Path, what: str) -> UserError:
    return UserError(f"damaged data: {what}; delete the folder {folder} and run again to rebuild it")


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    content = {"format": FORMAT, **content}
    content["digest"] = _digest(content)
    (folder / _NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest, whose numbers agree with one another. Raises UserError for any other."""
    try:
        data = read_bytes(folder / _NAME, _LARGEST)
        manifest = parse_json(data, Manifest, _NAME)
    except UserError as error:
        raise damaged(folder, str(error)) from None
    try:
        intact = manifest.digest == _digest(json.loads(data))
    except (ValueError, RecursionError):  # in fields that the schema does not read
        intact = False
    if not intact:
        raise damaged(folder, f"{_NAME} does not match its own digest")
    for name, entry in manifest.streams.items():
        if (fault := _fault(name, entry, manifest.dtype)) is not None:
            raise damaged(folder, f"{_NAME}: stream {name} {fault}")
    return manifest


def _fault(name: str, entry: StreamEntry, dtype: str) -> str | None:
    """What does not agree in a stream's entry, in words."""
    wanted = entry.shards * (2 if entry.masked else 1) + len(entry.columns)
    if len(entry.files) != wanted:
        return f"has {len(entry.files)} files, where {entry.shards} shards need {wanted}"
    sizes = {file.name: file.size for file in entry.files}
    shards = [shard_name(name, index) for index in range(entry.shards)]
    masks = [mask_name(name, index) for index in range(entry.shards if entry.masked else 0)]
    columns = {column_name(name, column): np.dtype(kind).itemsize for column, kind in entry.columns.items()}
    if sizes.keys() != {*shards, *masks, *columns}:
        others = sorted(sizes.keys() - {*shards, *masks, *columns})
        return f"has files of other names ({', '.join(others)[:200]})"
    for column, width in columns.items():
        if sizes[column] != width * entry.documents:
            return (
                f"has {sizes[column]} bytes in {column}, where {entry.documents} documents need {width} each"
            )
    width = np.dtype(dtype).itemsize
    if sum(sizes[shard] for shard in shards) != width * entry.tokens:
        return f"has other sizes of shards than {entry.tokens} tokens of {width} bytes"
    full = [sizes[shard] for shard in shards[:-1]]
    if full and (len(set(full)) > 1 or full[0] % width or not 0 < sizes[shards[-1]] <= full[0]):
        return "has shards of unequal sizes"
    if any(sizes[mask] * width != sizes[shard] for mask, shard in zip(masks, shards, strict=False)):
        return "has masks of other sizes than its shards"
    return None


def _digest(content: dict[str, Any]) -> str:
    return digest_of(json.dumps({key: content[key] for key in content if key != "digest"}, sort_keys=True))

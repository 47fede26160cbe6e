"""The manifest of a checkpoint: which files it has, of which size and hash; and the check against it.

Written last, over its own text too: a folder without an intact one is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.checkpoint.format import (
    EXTRA,
    FOLDER_NAME,
    FORMAT,
    MANIFEST,
    METADATA,
    VERSION,
    FormatError,
    as_file_name,
    as_object,
    as_size,
    check_version,
    parse,
    read_file,
    refuse,
)

_HASH = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 20


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
    document = as_object(parse(data), {"format", "version", "step", "files", "self"}, "manifest")
    check_version(document)
    if not isinstance(document["files"], dict):
        refuse("files is not an object")
    files = []
    for name, value in document["files"].items():
        entry = as_object(value, {"size", "sha256"}, name)
        digest = entry["sha256"]
        if digest is not None and not (isinstance(digest, str) and _HASH.fullmatch(digest)):
            refuse(f"{name} has no valid sha256")
        files.append(FileRecord(as_file_name(name), as_size(entry["size"], name), digest))
    manifest = Manifest(as_size(document["step"], "step"), tuple(files))
    if encode_manifest(manifest) != data:
        refuse("its own checksum differs")
    return manifest


def other_version(folder: Path) -> int | None:
    """The version of an intact manifest that another moetrain wrote; None for ours, or a damaged one."""
    try:
        document = parse(read_file(folder, MANIFEST))
        version, checksum = document["version"], document.pop("self")
    except (FormatError, KeyError, TypeError, AttributeError):
        return None
    intact = document.get("format") == FORMAT and checksum == hashlib.sha256(_dump(document)).hexdigest()
    return version if intact and type(version) is int and version != VERSION else None


def read_manifest(folder: Path) -> Manifest:
    """Raises FormatError where it is missing, damaged, or of another step than the folder's name says."""
    if not (folder / MANIFEST).exists():
        refuse("missing, so the checkpoint is incomplete")
    manifest = decode_manifest(read_file(folder, MANIFEST))
    named = FOLDER_NAME.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        refuse(f"written for step {manifest.step}, so the folder was renamed")
    return manifest


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

"""Hashes made right again after a mutation, as one would who means harm, or a fault in the writer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from moetrain.checkpoint.manifest import FileRecord, Manifest, encode_manifest, read_manifest
from moetrain.data.manifest import write_manifest


def signed_checkpoint(folder: Path, names: Sequence[str] | None = None) -> None:
    """Rewrite ``manifest.json`` for the files as they are; ``names``: others than it listed."""
    before = read_manifest(folder)
    listed = [record.name for record in before.files] if names is None else names
    files = [(folder / name).read_bytes() for name in listed]
    records = [
        FileRecord(n, len(d), hashlib.sha256(d).hexdigest()) for n, d in zip(listed, files, strict=True)
    ]
    (folder / "manifest.json").write_bytes(encode_manifest(Manifest(before.step, tuple(records))))


def signed_manifest(data: bytes) -> bytes:
    """A checkpoint's mutated manifest with its checksum of itself, where it is still an object."""
    try:
        document = json.loads(data)
        del document["self"]
        text = json.dumps(document, indent=1, sort_keys=True) + "\n"
        document["self"] = hashlib.sha256(text.encode("ascii")).hexdigest()
        return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode("ascii")
    except (ValueError, KeyError, TypeError, RecursionError):
        return data


def signed_data(folder: Path) -> None:
    """Rewrite the digest in a corpus's ``manifest.json``, where that is still an object."""
    try:
        document = json.loads((folder / "manifest.json").read_bytes())
        if isinstance(document, dict):
            write_manifest(folder, document)
    except (ValueError, TypeError, RecursionError):
        pass

"""From documents to a store: scan for the split, train the tokenizer if asked, tokenise, describe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrain.config.schema_data import DataConfig
from moetrain.data.bpe import cached_bpe
from moetrain.data.cache import log
from moetrain.data.documents import CleanDocument, Part
from moetrain.data.heldout import Scan, scan
from moetrain.data.shards import StreamWriter, write_manifest
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import UserError

Ints = npt.NDArray[np.int64]
_CHUNK_BYTES = 2**21  # text tokenised at a time: enough to keep the tokenizer's threads busy


def write_corpus(
    folder: Path, cfg: DataConfig, parts: Sequence[Part], tokenizer: Tokenizer | None, root: Path
) -> None:
    """Fill ``folder`` with a store and its tokenizer; ``tokenizer`` None: train a BPE on the training side.

    Reads the text two or three times, as a stream. Raises UserError when a side would be empty.
    """
    log.info("reading %s", _labels(parts))
    scanned = scan(parts, cfg.val_fraction)
    if tokenizer is None:
        tokenizer = cached_bpe(parts, scanned, cfg.tokenizer.vocab_size, root)
    tokenizer.save(folder / "tokenizer")
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    streams: dict[str, dict[str, Any]] = {}
    for index, part in enumerate(parts):
        streams |= _write_part(folder, index, part, scanned, tokenizer, dtype)
    _check_sides(cfg, parts, scanned, streams)
    manifest = {
        "sources": [{"name": part.name, "fingerprint": part.source.fingerprint()} for part in parts],
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "val_fraction": cfg.val_fraction,
        "exceptions": sorted(scanned.held_out.exceptions),
        "domains": scanned.domains,
        "dtype": dtype,
        "streams": streams,
    }
    write_manifest(folder, manifest)
    log.info("wrote %d tokens", sum(entry["tokens"] for entry in streams.values()))


def _write_part(
    folder: Path, index: int, part: Part, scanned: Scan, tokenizer: Tokenizer, dtype: str
) -> dict[str, dict[str, Any]]:
    """Tokenise one part into its two streams."""
    names = (stream_name(index, "train"), stream_name(index, "val"))
    writers = [StreamWriter(folder, name, dtype) for name in names]
    domain_ids = {name: number for number, name in enumerate(scanned.domains)}
    for document, tokens_N, counted in tokenised(part, tokenizer):
        writers[scanned.held_out(document.key)].add(
            tokens_N,
            num_bytes=len(document.raw),
            counted_bytes=counted,
            domain=domain_ids[document.domain],
        )
    return {name: writer.close() for name, writer in zip(names, writers, strict=True)}


def tokenised(part: Part, tokenizer: Tokenizer) -> Iterator[tuple[CleanDocument, Ints, int]]:
    """(document, its tokens and eos, the bytes of text that the tokens' own lengths add up to)."""
    token_bytes_V = tokenizer.token_bytes()
    for chunk in _chunks(part.cleaned()):
        encoded = tokenizer.encode_batch([document.text for document in chunk])
        for document, ids_N in zip(chunk, encoded, strict=True):
            yield document, np.append(ids_N, tokenizer.eos_id), int(token_bytes_V[ids_N].sum())


def stream_name(part: int, side: str) -> str:
    return f"{part:03d}-{side}"


def _chunks(documents: Iterable[CleanDocument]) -> Iterator[list[CleanDocument]]:
    chunk: list[CleanDocument] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.raw)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _check_sides(
    cfg: DataConfig, parts: Sequence[Part], scanned: Scan, streams: dict[str, dict[str, Any]]
) -> None:
    trained, held = (
        [streams[stream_name(index, side)]["documents"] for index in range(len(parts))]
        for side in ("train", "val")
    )
    if not sum(held) or not sum(trained):
        raise UserError(
            f"{_labels(parts)}: {scanned.documents} documents give {sum(trained)} to train on and "
            f"{sum(held)} held out (data.val_fraction={cfg.val_fraction}); both need one, so give at least "
            "two different documents (a text file is one document: split it, or use jsonl)"
        )
    for part, count in zip(parts, trained, strict=True):
        if not count:
            raise UserError(f"{part.label}: all its documents are held out, 0 are left to train on")


def _labels(parts: Sequence[Part]) -> str:
    return ", ".join(part.label for part in parts)

"""From documents to a store: scan for the split, train the tokenizer if asked, tokenise, describe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moetrain.data.bpe import cached_bpe
from moetrain.data.cache import log
from moetrain.data.chat.files import TemplateFiles
from moetrain.data.documents import CleanDocument, Part, Remembered, Spans
from moetrain.data.heldout import Scan, scan
from moetrain.data.manifest import write_manifest
from moetrain.data.options import DataConfig
from moetrain.data.stream_writer import Mask, StreamWriter
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import UserError

Ints = npt.NDArray[np.int64]
_MANY_UNKNOWN = 0.1  # a share of the tokens
_CHUNK_BYTES = 2**21  # text tokenised at a time: enough to keep the tokenizer's threads busy


def write_corpus(
    folder: Path,
    cfg: DataConfig,
    parts: Sequence[Part],
    tokenizer: Tokenizer | None,
    root: Path,
    template_files: TemplateFiles | None = None,
) -> None:
    """Fill ``folder`` with a store and its tokenizer; ``tokenizer`` None: train a BPE on the training side.

    ``template_files``: those that the tokenizer goes on with, where they are not its own.

    Goes over the text two or three times, as a stream: a small one stays in memory and is read once. Raises
    UserError when a side would be empty.
    """
    parts = [replace(part, source=Remembered(part.source)) for part in parts]
    log.info("reading %s", _labels(parts))
    scanned = scan(parts, cfg.val_fraction)
    if tokenizer is None:
        tokenizer = cached_bpe(parts, scanned, cfg.tokenizer.vocab_size, root)
    if template_files is not None:
        tokenizer = tokenizer.with_templates(template_files)
    tokenizer.save(folder / "tokenizer")
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    streams: dict[str, dict[str, Any]] = {}
    losses = [Loss() for _ in parts]
    for index, (part, loss) in enumerate(zip(parts, losses, strict=True)):
        streams |= _write_part(folder, index, part, scanned, tokenizer, dtype, loss)
    _check_sides(
        cfg, parts, scanned, streams, [loss.told(tokenizer) if loss.empty else "" for loss in losses]
    )
    for part, loss in zip(parts, losses, strict=True):
        for line in loss.warnings(tokenizer):
            log.warning("%s: %s", part.label, line)
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
    folder: Path, index: int, part: Part, scanned: Scan, tokenizer: Tokenizer, dtype: str, loss: Loss
) -> dict[str, dict[str, Any]]:
    """Tokenise one part into its two streams."""
    names = (stream_name(index, "train"), stream_name(index, "val"))
    writers = [StreamWriter(folder, name, dtype, masked=part.masked) for name in names]
    domain_ids = {name: number for number, name in enumerate(scanned.domains)}
    for document, tokens_N, counted, mask in tokenised(part, tokenizer, loss):
        writers[scanned.held_out(document.key)].add(
            tokens_N,
            num_bytes=document.num_bytes,
            counted_bytes=counted,
            domain=domain_ids[document.domain],
            mask=mask,
        )
    return {name: writer.close() for name, writer in zip(names, writers, strict=True)}


@dataclass
class Loss:
    """What a tokenizer left out of a text. ``tokens`` are without the ends of documents."""

    documents: int = 0
    empty: int = 0  # documents of which no token is left
    bytes: int = 0
    tokens: int = 0
    unknown: int = 0  # tokens that stand for text outside the vocabulary

    def told(self, tokenizer: Tokenizer) -> str:
        return (
            f"{tokenizer.label} makes no token of {self.empty:,} of {self.documents:,} documents "
            f"({self.tokens:,} tokens of {self.bytes:,} bytes); choose a tokenizer that knows this text"
        )

    def warnings(self, tokenizer: Tokenizer) -> Iterator[str]:
        if self.empty:
            yield f"{self.told(tokenizer)}; these documents are left out"
        if self.unknown > _MANY_UNKNOWN * self.tokens:
            share = self.unknown / self.tokens
            yield f"{share:.0%} of the tokens are {tokenizer.label}'s token for unknown text: it is lost"


class Tokenised(NamedTuple):
    """``counted``: the bytes of text that the tokens' own lengths add up to. ``mask`` None: all train."""

    document: CleanDocument
    tokens_N: Ints
    counted: int
    mask: Mask | None


def tokenised(part: Part, tokenizer: Tokenizer, loss: Loss) -> Iterator[Tokenised]:
    """The documents as tokens, those without marks with an eos.

    A document without a token is left out: its end would be learned from nothing. ``loss`` counts on.
    """
    token_bytes_V = tokenizer.token_bytes()
    for chunk in _chunks(part.cleaned()):
        for document, (ids_N, mask) in zip(chunk, _encoded(chunk, tokenizer), strict=True):
            loss.documents += 1
            loss.bytes += document.num_bytes
            loss.tokens += len(ids_N)
            loss.empty += not len(ids_N)
            if tokenizer.unk_id is not None:
                loss.unknown += int((ids_N == tokenizer.unk_id).sum())
            if not len(ids_N):
                continue
            counted = int(token_bytes_V[ids_N].sum())
            ended_N = np.append(ids_N, tokenizer.eos_id) if mask is None else ids_N
            yield Tokenised(document, ended_N, counted, mask)


def _encoded(chunk: Sequence[CleanDocument], tokenizer: Tokenizer) -> Iterator[tuple[Ints, Mask | None]]:
    """A source marks all of its documents, or none."""
    texts = [document.text for document in chunk]
    marks = [document.marks for document in chunk if document.marks is not None]
    if not marks:
        yield from ((ids_N, None) for ids_N in tokenizer.encode_batch(texts))
        return
    for placed, each in zip(tokenizer.encode_marked(texts, [m.control for m in marks]), marks, strict=True):
        trains_N = _trained(placed.starts_N, each.trained)
        trains_N[:1] = False
        yield placed.ids_N, Mask(trains_N, each.file, each.row)


def _trained(starts_N: Ints, spans: Spans) -> npt.NDArray[np.bool_]:
    """Whether each token begins within a span; one that begins before it belongs to what stands before."""
    begins, ends = np.array(spans, np.int64).reshape(-1, 2).T
    span_N = np.searchsorted(begins, starts_N, side="right") - 1
    found: npt.NDArray[np.bool_] = (span_N >= 0) & (starts_N < ends[span_N])
    return found


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
    cfg: DataConfig,
    parts: Sequence[Part],
    scanned: Scan,
    streams: dict[str, dict[str, Any]],
    lost: Sequence[str],
) -> None:
    """``lost``: what the tokenizer makes nothing of in each part, in words; "" where it is nothing."""
    trained, held = (
        [streams[stream_name(index, side)]["documents"] for index in range(len(parts))]
        for side in ("train", "val")
    )
    for part, count, words in zip(parts, trained, lost, strict=True):
        if words and not count:
            raise UserError(f"{part.label}: nothing is left to train on: {words}")
    if any(lost) and not sum(held):
        raise UserError(f"{_labels(parts)}: nothing is left to hold out: {'; '.join(filter(None, lost))}")
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

"""Whole files as sequences to score: no side held out, nothing cached, each file's domains of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moetrain.data.cache import log
from moetrain.data.chat.settings import Overlong
from moetrain.data.conversations import PackedConversations, Sums, sum_of
from moetrain.data.documents import Part
from moetrain.data.ingest import Loss, Tokenised, tokenised
from moetrain.data.packing import PackedSplit, Packing
from moetrain.data.shards import StreamMask, TokenStream
from moetrain.data.sources.turns import refuse_overlong
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import UserError

_MOST = 2**16  # a stream's domain ids are uint16


@dataclass(frozen=True)
class WholeFiles:
    """``labels``: of each domain id the place of its file among the parts, and the documents' own domain.

    ``sums``: what became of conversations, where documents train in part.
    """

    split: PackedSplit
    labels: tuple[tuple[int, str], ...]
    sums: Sums | None


def whole_files(parts: Sequence[Part], tokenizer: Tokenizer, packing: Packing) -> WholeFiles:
    """The files in memory, tokenised; each is a part, and no window has two of them.

    Raises UserError for a file that cannot be read, and where no file has two tokens, or one that trains.
    """
    loss, labels = Loss(), dict[tuple[int, str], int]()
    streams = [_stream(part, number, tokenizer, loss, labels) for number, part in enumerate(parts)]
    for part, stream in zip(parts, streams, strict=True):
        if part.overlong is Overlong.refuse:
            refuse_overlong(part.source, stream, packing.seq_len)
    overlong = [part.overlong for part in parts]
    split = PackedSplit(streams, packing, tokenizer.token_bytes(), "", overlong)
    found = [windows.sums for windows in split.parts if isinstance(windows, PackedConversations)]
    sums = sum_of(found) if found else None
    if not len(split):
        lost = f": {loss.told(tokenizer)}" if loss.empty else ""
        if sums is not None and loss.documents:
            raise UserError(f"data.path: nothing is left to score ({sums}): raise data.seq_len{lost}")
        raise UserError(f"data.path: none of the {len(parts)} files holds text{lost}")
    for line in loss.warnings(tokenizer):
        log.warning("data.path: %s", line)
    return WholeFiles(split, tuple(labels), sums)


def _stream(
    part: Part, number: int, tokenizer: Tokenizer, loss: Loss, labels: dict[tuple[int, str], int]
) -> TokenStream:
    """Adds the file's domains to ``labels``."""
    found = list(tokenised(part, tokenizer, loss))
    for each in found:
        labels.setdefault((number, each.document.domain), len(labels))
    if len(labels) > _MOST:
        raise UserError(f"data.path names more than {_MOST:,} files and domains of files: score some at once")
    tokens_N = np.concatenate([each.tokens_N.astype(np.uint32) for each in found] or [np.zeros(0, np.uint32)])
    return TokenStream(
        shards=[tokens_N],
        shard_tokens=max(1, len(tokens_N)),
        ends_M=np.cumsum([len(each.tokens_N) for each in found], dtype=np.int64),
        domains_M=np.array([labels[number, each.document.domain] for each in found], np.uint16),
        num_tokens=len(tokens_N),
        num_bytes=sum(each.document.num_bytes for each in found),
        counted_bytes=sum(each.counted for each in found),
        mask=_mask(found) if part.masked else None,
    )


def _mask(found: Sequence[Tokenised]) -> StreamMask:
    masks = [each.mask for each in found if each.mask is not None]
    columns = [mask.columns() for mask in masks]

    def column(name: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.array([each[name] for each in columns], np.int64)

    trains_N = np.concatenate([mask.trains_N for mask in masks] or [np.zeros(0, bool)]).astype(np.uint8)
    files_M = column("files").astype(np.uint32)
    return StreamMask([trains_N], column("trained"), column("firsts"), files_M, column("rows"))

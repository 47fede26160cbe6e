"""Whole files as sequences to score: no side held out, nothing cached, each file a domain of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moetrain.data.cache import log
from moetrain.data.documents import Part
from moetrain.data.ingest import Loss, tokenised
from moetrain.data.options import TextFormat
from moetrain.data.packing import PackedSplit, Packing
from moetrain.data.shards import TokenStream
from moetrain.data.sources.local import LocalSource
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import UserError

_MOST_FILES = 2**16  # a stream's domain ids are uint16


def whole_files(
    files: Sequence[Path], format: TextFormat, text_key: str, tokenizer: Tokenizer, packing: Packing
) -> PackedSplit:
    """The files in memory, tokenised; no window has two of them. Domain ids are places in ``files``.

    Raises UserError for a file that cannot be read as text, and where no file has two tokens.
    """
    if len(files) > _MOST_FILES:
        raise UserError(f"data.path names {len(files):,} files; at most {_MOST_FILES:,} are scored at once")
    loss = Loss()
    streams = [
        _stream(Part(LocalSource(str(file), format, text_key)), number, tokenizer, loss)
        for number, file in enumerate(files)
    ]
    split = PackedSplit(streams, packing, tokenizer.token_bytes(), fingerprint="")
    if not len(split):
        lost = f": {loss.told(tokenizer)}" if loss.empty else ""
        raise UserError(f"data.path: none of the {len(files)} files holds text{lost}")
    for line in loss.warnings(tokenizer):
        log.warning("data.path: %s", line)
    return split


def _stream(part: Part, domain: int, tokenizer: Tokenizer, loss: Loss) -> TokenStream:
    found = list(tokenised(part, tokenizer, loss))
    tokens_N = np.concatenate([each.tokens_N.astype(np.uint32) for each in found] or [np.zeros(0, np.uint32)])
    return TokenStream(
        shards=[tokens_N],
        shard_tokens=max(1, len(tokens_N)),
        ends_M=np.cumsum([len(each.tokens_N) for each in found], dtype=np.int64),
        domains_M=np.full(len(found), domain, np.uint16),
        num_tokens=len(tokens_N),
        num_bytes=sum(len(each.document.raw) for each in found),
        counted_bytes=sum(each.counted for each in found),
    )

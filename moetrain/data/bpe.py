"""Byte-level BPE, trained on the training documents only, and cached by what it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moetrain.data.cache import build_once, log
from moetrain.data.documents import Part, content_key
from moetrain.data.heldout import Scan
from moetrain.data.tokenizer import EOS, JsonTokenizer, Tokenizer, load_tokenizer

SAMPLE_BYTES = 10_000_000  # beyond this the merges barely change, while the time grows
_PIECE = 32_768  # characters; long documents are sampled in pieces


def cached_bpe(parts: Iterable[Part], scanned: Scan, vocab_size: int, root: Path) -> Tokenizer:
    """The tokenizer of this training text and size: trained once, then read from ``root/tokenizers``.

    It may end up smaller than ``vocab_size`` when the text has too few distinct pairs to merge.
    """
    pieces = list(sample(parts, scanned))
    digest = hashlib.sha256(f"{vocab_size} {tokenizers.__version__}".encode())
    for piece in pieces:
        digest.update(piece.encode() + b"\0")
    folder = root / "tokenizers" / f"bpe-{vocab_size}-{digest.hexdigest()[:20]}"
    return load_tokenizer(build_once(folder, lambda temporary: train_bpe(pieces, vocab_size).save(temporary)))


def sample(parts: Iterable[Part], scanned: Scan) -> Iterator[str]:
    """About ``SAMPLE_BYTES`` of training text, in pieces chosen by content: domains keep their shares."""
    share = min(1.0, SAMPLE_BYTES / max(1, scanned.train_bytes))
    for part in parts:
        for document in part.cleaned():
            if scanned.held_out(document.key):
                continue
            for start in range(0, len(document.text), _PIECE):
                piece = document.text[start : start + _PIECE]
                if share == 1.0 or content_key(piece.encode() + b"bpe") < share * 2.0**64:
                    yield piece


def train_bpe(pieces: list[str], vocab_size: int) -> JsonTokenizer:
    """Deterministic: the same pieces and size give the same merges, whatever the number of threads."""
    log.info("training a BPE tokenizer of %d tokens on %d characters", vocab_size, sum(map(len, pieces)))
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return JsonTokenizer(tokenizer, EOS)

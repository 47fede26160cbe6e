"""``prepare``: from a config to a tokenised corpus, made once and opened from the cache afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain.cache_folder import cache_root
from moetrain.data.bpe import SAMPLE_BYTES
from moetrain.data.cache import build_once, log
from moetrain.data.chat.settings import Overlong
from moetrain.data.conversations import PackedConversations
from moetrain.data.documents import Part, digest_of
from moetrain.data.ingest import stream_name, write_corpus
from moetrain.data.manifest import FORMAT, Manifest, TokenizerEntry, damaged
from moetrain.data.options import DataConfig, TokenizerConfig, TokenizerKind
from moetrain.data.order import MixtureOrder, Order, SampleOrder
from moetrain.data.packing import PackedSplit, Packing
from moetrain.data.rules import check_data
from moetrain.data.shards import open_store
from moetrain.data.sources import build_parts
from moetrain.data.sources.turns import common_templates, refuse_overlong
from moetrain.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from moetrain.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """Both sides of a tokenised corpus, and the order in which to train on it.

    ``fingerprint`` depends on the tokens and on ``seq_len``, not on where the text lies. ``domains`` names
    the domain ids of the batches. ``order`` is a SampleOrder, or a MixtureOrder, of the seed given. ``val``
    holds all held-out text of all parts, whatever their weights.
    """

    tokenizer: Tokenizer
    train: PackedSplit
    val: PackedSplit
    domains: tuple[str, ...]
    fingerprint: str
    order: Order
    folder: Path


def prepare(cfg: DataConfig, seed: int = 0) -> Corpus:
    """Tokenise the text of ``cfg`` into the cache, unless it is there, and open it.

    Safe to call from several processes at once: one works, the others wait. The folder's key holds the
    sources' fingerprints, the tokenizer and ``val_fraction``, so that changed text is prepared anew. Raises
    UserError for everything that the user can mend.
    """
    check_data(cfg)
    root = cache_root(cfg.cache_dir)
    tokenizer = _given_tokenizer(cfg.tokenizer)
    parts = build_parts(cfg, root, tokenizer)
    template_files = common_templates(parts)
    key = _key(cfg, parts, tokenizer)
    folder = root / "corpora" / f"{type(cfg).__name__.removesuffix('Data').lower()}-{key[:20]}"

    def build(temporary: Path) -> None:
        write_corpus(temporary, cfg, parts, tokenizer, root, template_files)
        if _key(cfg, parts, tokenizer) != key:
            raise UserError(f"{', '.join(part.label for part in parts)}: changed while being read; run again")

    build_once(folder, build)
    return _open(folder, cfg, parts, seed)


def _given_tokenizer(cfg: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer, or None when it has yet to be trained."""
    if cfg.kind is TokenizerKind.bytes:
        return ByteTokenizer()
    if cfg.kind is TokenizerKind.bpe:
        return None
    assert cfg.path is not None
    return load_tokenizer(cfg.path)


def _key(cfg: DataConfig, parts: Sequence[Part], tokenizer: Tokenizer | None) -> str:
    sources = [(part.name, part.source.fingerprint()) for part in parts]
    tokens = tokenizer.fingerprint if tokenizer else digest_of("bpe", cfg.tokenizer.vocab_size, SAMPLE_BYTES)
    return digest_of(FORMAT, sources, tokens, cfg.val_fraction)


def _open(folder: Path, cfg: DataConfig, parts: Sequence[Part], seed: int) -> Corpus:
    manifest, streams = open_store(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    if manifest.tokenizer != TokenizerEntry(tokenizer.fingerprint, tokenizer.vocab_size):
        raise damaged(folder, f"{folder / 'tokenizer'} is not the tokenizer that it was made with")
    wanted = {stream_name(index, side) for index in range(len(parts)) for side in ("train", "val")}
    if streams.keys() != wanted or manifest.domains is None or manifest.val_fraction != cfg.val_fraction:
        raise damaged(folder, "manifest.json describes another corpus")
    overlong = [part.overlong for part in parts]
    cut = [each.value for each in overlong if each is not None]
    fingerprint = digest_of(tokenizer.fingerprint, _hashes(manifest), cfg.seq_len, *cut)

    def split(side: str) -> PackedSplit:
        packing = Packing(
            seq_len=cfg.seq_len,
            eos_id=tokenizer.eos_id,
            keep_documents=not cfg.cross_document_attention,
            reset_positions=cfg.reset_positions,
            pad_last=side == "val",
        )
        chosen = [streams[stream_name(index, side)] for index in range(len(parts))]
        for part, stream in zip(parts, chosen, strict=True):
            if part.overlong is Overlong.refuse:
                refuse_overlong(part.source, stream, cfg.seq_len)
        return PackedSplit(chosen, packing, tokenizer.token_bytes(), digest_of(fingerprint, side), overlong)

    train, val = split("train"), split("val")
    for side in (train, val):
        for part, windows in zip(parts, side.parts, strict=True):
            if isinstance(windows, PackedConversations) and windows.stream.num_documents:
                _tell(part, windows, "train" if side is train else "held out")
    for part, length, tokens in zip(parts, train.part_lengths, train.part_tokens, strict=True):
        if not length:
            raise UserError(
                f"{part.label}: its training side has {tokens} tokens, fewer than one sequence of "
                f"data.seq_len={cfg.seq_len} and its last label: give more text, or lower data.seq_len"
            )
    order: Order = SampleOrder(len(train), seed)
    if len(parts) > 1:
        order = MixtureOrder(train.part_lengths, [part.weight for part in parts], seed)
    return Corpus(tokenizer, train, val, tuple(manifest.domains), fingerprint, order, folder)


def _tell(part: Part, windows: PackedConversations, side: str) -> None:
    """Say how many tokens train. Raises UserError where none does."""
    if not len(windows):
        raise UserError(
            f"{part.label}: no conversation is left on the {side} side ({windows.sums}): raise data.seq_len, "
            f"give more rows, or set {part.key}.overlong=truncate"
        )
    log.info("%s, %s: %s", part.label, side, windows.sums)


def _hashes(manifest: Manifest) -> list[tuple[str, str]]:
    return sorted((file.name, file.sha256) for file in manifest.files().values())

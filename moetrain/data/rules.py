"""What preparing text refuses of its settings."""

from __future__ import annotations

import os
from datetime import date

from moetrain.bounds import check_ranges
from moetrain.data.chat.options import TurnsData
from moetrain.data.options import (
    DataConfig,
    DomainsData,
    LocalData,
    MixtureData,
    MixturePart,
    SourceKind,
    TextFormat,
    TokenizerConfig,
    TokenizerKind,
)
from moetrain.data.sources.domains import check_domains
from moetrain.data.sources.paths import find_files
from moetrain.errors import UserError

MIN_BPE = 257  # 256 bytes and the end-of-text token


def check_data(cfg: DataConfig) -> None:
    """Raise UserError for the first setting that is out of its range, or does not fit the others."""
    check_ranges(cfg, "data")
    _check_tokenizer(cfg.tokenizer)
    if isinstance(cfg, DomainsData):
        check_domains(cfg.domains)
    if isinstance(cfg, TurnsData):
        _check_turns(cfg)
    if isinstance(cfg, MixtureData):
        if not cfg.parts:
            raise UserError(
                "data.parts is empty: a mixture needs at least one, "
                "as in 'data.parts.docs={kind: local, path: /corpus, weight: 2}'"
            )
        for name, part in cfg.parts.items():
            _check_part(f"data.parts.{name}", part)


def check_paths(cfg: DataConfig) -> None:
    """Raise UserError for a path of local text that names no file. It walks folders."""
    if isinstance(cfg, (LocalData, TurnsData)):
        find_files(cfg.path)
    if isinstance(cfg, MixtureData):
        for name, part in cfg.parts.items():
            if part.kind is SourceKind.local:
                find_files(str(part.path), f"data.parts.{name}.path")


def _check_tokenizer(t: TokenizerConfig) -> None:
    if t.kind is TokenizerKind.bpe and t.vocab_size < MIN_BPE:
        raise UserError(
            f"data.tokenizer.vocab_size={t.vocab_size} must be {MIN_BPE} or more: "
            "256 bytes and the end of text"
        )
    if t.kind is TokenizerKind.file and t.path is None:
        raise UserError("data.tokenizer.kind=file needs data.tokenizer.path: a tokenizer.json or its folder")
    if t.kind is not TokenizerKind.file and t.path is not None:
        raise UserError(
            f"data.tokenizer.path={t.path} is not used by data.tokenizer.kind={t.kind.name}: "
            "set data.tokenizer.kind=file, or leave the path out"
        )
    if t.path is not None and not os.path.exists(os.path.expanduser(t.path)):
        raise UserError(f"data.tokenizer.path={t.path} does not exist: name a tokenizer.json or its folder")


def _check_turns(cfg: TurnsData) -> None:
    try:
        date.fromisoformat(cfg.template_date)
    except ValueError:
        raise UserError(
            f"data.template_date={cfg.template_date} is no date: write it as 2025-01-31"
        ) from None
    if cfg.format is TextFormat.text:
        raise UserError(f"data.format=text: data={cfg.source} reads rows, jsonl or parquet")
    taken = {"messages", "tools", "documents", "add_generation_prompt"} & cfg.template_args.keys()
    if taken:
        raise UserError(
            f"data.template_args.{min(taken)} is what a template gets from each row: leave it out"
        )
    if cfg.chat_template is not None and not os.path.isfile(os.path.expanduser(cfg.chat_template)):
        raise UserError(f"data.chat_template={cfg.chat_template} is no file: name a file of Jinja text")


def _check_part(key: str, part: MixturePart) -> None:
    needs_path = part.kind in (SourceKind.local, SourceKind.hub)
    if needs_path and part.path is None:
        raise UserError(f"{key}.path is not set: {key}.kind={part.kind.name} needs one")
    if not needs_path and part.path is not None:
        raise UserError(f"{key}.path={part.path} is not used by {key}.kind={part.kind.name}: leave it out")
    if part.domains and part.kind is not SourceKind.domains:
        raise UserError(f"{key}.domains={part.domains} is used by {key}.kind=domains, not {part.kind.name}")
    if part.domains:
        check_domains(part.domains, f"{key}.domains")

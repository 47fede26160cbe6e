"""What preparing text refuses of its settings."""

from __future__ import annotations

import os
from dataclasses import fields
from datetime import date

from moetrain.bounds import check_ranges
from moetrain.data.chat.options import TURNS, TurnsData, names_of
from moetrain.data.chat.settings import RowsSettings, TurnsSettings
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
        check_rows(cfg, f"data={cfg.source}", cfg.format, "data")
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
            if part.kind is SourceKind.local or part.kind.value in TURNS:
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


def check_rows(given: TurnsSettings, kind: str, format: TextFormat, key: str) -> None:
    """Raise UserError for settings of rows that do not fit; ``key``: where they stand."""
    try:
        date.fromisoformat(given.template_date)
    except ValueError:
        raise UserError(
            f"{key}.template_date={given.template_date} is no date: write it as 2025-01-31"
        ) from None
    if format is TextFormat.text:
        raise UserError(f"{key}.format=text: {kind} reads rows, jsonl or parquet")
    taken = {"messages", "tools", "documents", "add_generation_prompt"} & given.template_args.keys()
    if taken:
        raise UserError(
            f"{key}.template_args.{min(taken)} is what a template gets from each row: leave it out"
        )
    if given.chat_template is not None and not os.path.isfile(os.path.expanduser(given.chat_template)):
        raise UserError(f"{key}.chat_template={given.chat_template} is no file: name a file of Jinja text")


def refuse_unread(given: RowsSettings, kind: str, key: str) -> None:
    """Raise UserError for a setting of rows that ``key.kind`` does not read, which would seem to count."""
    default = RowsSettings()
    for each in fields(RowsSettings):
        value = getattr(given, each.name)
        if each.name not in names_of(kind) and value != getattr(default, each.name):
            shown = getattr(value, "name", value)
            raise UserError(f"{key}.{each.name}={shown} is not used by {key}.kind={kind}: leave it out")


def _check_part(key: str, part: MixturePart) -> None:
    of_rows = part.kind.value in TURNS
    needs_path = part.kind in (SourceKind.local, SourceKind.hub) or of_rows
    if needs_path and part.path is None:
        raise UserError(f"{key}.path is not set: {key}.kind={part.kind.name} needs one")
    if not needs_path and part.path is not None:
        raise UserError(f"{key}.path={part.path} is not used by {key}.kind={part.kind.name}: leave it out")
    if part.domains and part.kind is not SourceKind.domains:
        raise UserError(f"{key}.domains={part.domains} is used by {key}.kind=domains, not {part.kind.name}")
    refuse_unread(part, part.kind.value, key)
    if of_rows:
        if part.text_key != MixturePart.text_key:
            raise UserError(
                f"{key}.text_key={part.text_key} is not used by {key}.kind={part.kind.name}: leave it out"
            )
        check_rows(part, f"{key}.kind={part.kind.name}", part.format, key)
    if part.domains:
        check_domains(part.domains, f"{key}.domains")

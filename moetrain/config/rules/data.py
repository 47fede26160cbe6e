"""Rules about the text: paths that exist, a tokenizer, a held-out share, the parts of a mixture."""

from __future__ import annotations

import os

from moetrain.data.options import (
    DomainsData,
    LocalData,
    MixtureData,
    MixturePart,
    SourceKind,
    TokenizerKind,
)
from moetrain.errors import UserError
from moetrain.train.options import TrainConfig

_MIN_BPE = 257  # 256 bytes and the end-of-text token


def tokenizer_fits(cfg: TrainConfig, world: int) -> None:
    t = cfg.data.tokenizer
    if t.kind is TokenizerKind.bpe and t.vocab_size < _MIN_BPE:
        raise UserError(
            f"data.tokenizer.vocab_size={t.vocab_size} must be {_MIN_BPE} or more: "
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


def local_path_matches(cfg: TrainConfig, world: int) -> None:
    if isinstance(cfg.data, LocalData):
        _find(cfg.data.path, "data.path")


def domains_are_known(cfg: TrainConfig, world: int) -> None:
    if isinstance(cfg.data, DomainsData):
        _check_domains(cfg.data.domains, "data.domains")


def mixture_has_parts(cfg: TrainConfig, world: int) -> None:
    if not isinstance(cfg.data, MixtureData):
        return
    if not cfg.data.parts:
        raise UserError(
            "data.parts is empty: a mixture needs at least one, "
            "as in 'data.parts.docs={kind: local, path: /corpus, weight: 2}'"
        )
    for name, part in cfg.data.parts.items():
        _check_part(f"data.parts.{name}", part)


def _check_part(key: str, part: MixturePart) -> None:
    needs_path = part.kind in (SourceKind.local, SourceKind.hub)
    if needs_path and part.path is None:
        raise UserError(f"{key}.path is not set: {key}.kind={part.kind.name} needs one")
    if not needs_path and part.path is not None:
        raise UserError(f"{key}.path={part.path} is not used by {key}.kind={part.kind.name}: leave it out")
    if part.domains and part.kind is not SourceKind.domains:
        raise UserError(f"{key}.domains={part.domains} is used by {key}.kind=domains, not {part.kind.name}")
    if part.kind is SourceKind.local:
        _find(str(part.path), f"{key}.path")
    if part.domains:
        _check_domains(part.domains, f"{key}.domains")


def _find(path: str, key: str) -> None:
    from moetrain.data.sources.local import find_files

    try:
        find_files(path)
    except UserError as e:
        raise UserError(str(e).replace("data.path", key, 1)) from e


def _check_domains(names: list[str], key: str) -> None:
    from moetrain.data.sources.domains import DOMAINS

    unknown = [n for n in names if n not in DOMAINS]
    if unknown or not names or len(set(names)) < len(names):
        raise UserError(f"{key}={names} must name at least one of {', '.join(DOMAINS)}, each once")


RULES = (tokenizer_fits, local_path_matches, domains_are_known, mixture_has_parts)

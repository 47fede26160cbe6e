"""Sources of documents, and the one place that maps a config to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moetrain.data.chat.files import TemplateFiles
from moetrain.data.chat.options import TURNS, ChatData, PromptCompletionData, TurnsData, turns_data
from moetrain.data.documents import Part, Source
from moetrain.data.options import (
    DataConfig,
    DomainsData,
    HubData,
    LocalData,
    MixtureData,
    MixturePart,
    SourceKind,
    StdlibData,
)
from moetrain.data.sources.chat import ChatSource
from moetrain.data.sources.domains import DOMAINS, DomainsSource
from moetrain.data.sources.hub import HubSource
from moetrain.data.sources.local import LocalSource
from moetrain.data.sources.prompt_completion import PromptCompletionSource
from moetrain.data.sources.stdlib import StdlibSource
from moetrain.data.sources.turns import TurnsSource
from moetrain.data.tokenizer import OWN_WORDS, Tokenizer
from moetrain.errors import UserError

__all__ = ["build_parts", "turns_source"]


def build_parts(cfg: DataConfig, root: Path, tokenizer: Tokenizer | None = None) -> list[Part]:
    """The corpus's sources: one, or the parts of a mixture in the order of their names.

    ``root`` is the cache folder, ``tokenizer`` None where it has yet to be trained; ``cfg`` has passed
    :func:`~moetrain.data.rules.check_data`. Raises UserError
    for paths that match nothing, unknown domains, and packages that are not there.
    """
    if isinstance(cfg, MixtureData):
        return [_mixture_part(name, cfg.parts[name], root, tokenizer) for name in sorted(cfg.parts)]
    if isinstance(cfg, TurnsData):
        return [Part(turns_source(cfg, tokenizer), overlong=cfg.overlong)]
    return [Part(_source(cfg, root))]


def turns_source(cfg: TurnsData, tokenizer: Tokenizer | None, key: str = "data") -> TurnsSource[Any]:
    """Rows that train in part, as ``tokenizer`` writes them; ``key``: where the settings of ``cfg`` stand."""
    words, files, label = OWN_WORDS, TemplateFiles(), "a tokenizer that is trained here"
    if tokenizer is not None:
        words, files, label = tokenizer.words, tokenizer.template_files, tokenizer.label
    if isinstance(cfg, ChatData):
        return ChatSource(cfg, words, files, label, key)
    assert isinstance(cfg, PromptCompletionData)
    return PromptCompletionSource(cfg, words, files, label, key)


def _source(cfg: DataConfig, root: Path) -> Source:
    if isinstance(cfg, StdlibData):
        return StdlibSource()
    if isinstance(cfg, LocalData):
        return LocalSource(cfg.path, cfg.format, cfg.text_key, cfg.domain_key)
    if isinstance(cfg, HubData):
        return HubSource(root, cfg.path, cfg.name, cfg.split, cfg.text_key, cfg.max_documents)
    if isinstance(cfg, DomainsData):
        return DomainsSource(root, cfg.domains)
    raise UserError(
        f"data: {type(cfg).__name__} names no source; choose stdlib, local, hub, domains, mixture, "
        "chat or prompt_completion"
    )


def _mixture_part(name: str, part: MixturePart, root: Path, tokenizer: Tokenizer | None) -> Part:
    if part.kind.value in TURNS:
        cfg = turns_data(part.kind.value, part, str(part.path), part.format)
        source = turns_source(cfg, tokenizer, f"data.parts.{name}")
        return Part(source, name, part.weight, part.overlong)
    return Part(_part_source(part, root), name, part.weight)


def _part_source(part: MixturePart, root: Path) -> Source:
    if part.kind is SourceKind.stdlib:
        return StdlibSource()
    if part.kind is SourceKind.domains:
        return DomainsSource(root, part.domains or DOMAINS)
    assert part.path is not None
    if part.kind is SourceKind.local:
        return LocalSource(part.path, part.format, part.text_key)
    return HubSource(root, part.path, text_key=part.text_key)

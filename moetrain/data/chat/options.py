"""The settings of ``data=chat`` and ``data=prompt_completion``."""

from dataclasses import dataclass, fields
from typing import Optional

from moetrain.data.chat.settings import ChatSettings, PairSettings, RowsSettings, TurnsSettings
from moetrain.data.options import DataConfig, TextFormat
from moetrain.missing import MISSING


@dataclass(frozen=True)
class TurnsData(TurnsSettings, DataConfig):
    """What conversations and prompts share."""

    path: str = MISSING  # a file, a directory or a glob, of JSON lines or Parquet
    format: TextFormat = TextFormat.auto
    domain_key: Optional[str] = None


@dataclass(frozen=True)
class ChatData(ChatSettings, TurnsData):
    """Rows of messages."""

    source: str = "chat"


@dataclass(frozen=True)
class PromptCompletionData(PairSettings, TurnsData):
    """Rows of two columns, texts or lists of messages; the completion trains."""

    source: str = "prompt_completion"


TURNS: dict[str, type[TurnsData]] = {"chat": ChatData, "prompt_completion": PromptCompletionData}


def names_of(kind: str) -> set[str]:
    """The settings that rows of a kind have; none where it is no kind of rows."""
    known = {each.name for each in fields(TURNS[kind])} if kind in TURNS else set()
    return known & {each.name for each in fields(RowsSettings)}


def turns_data(
    kind: str, given: RowsSettings, path: str, format: TextFormat, domain_key: str | None = None
) -> TurnsData:
    """The rows of ``path`` as ``data=kind`` has them, all else at its default."""
    settings = {name: getattr(given, name) for name in names_of(kind)}
    return TURNS[kind](path=path, format=format, domain_key=domain_key, **settings)

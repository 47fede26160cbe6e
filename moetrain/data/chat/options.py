"""The settings of ``data=chat`` and ``data=prompt_completion``."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from moetrain.bounds import at_least
from moetrain.data.options import DataConfig, TextFormat
from moetrain.missing import MISSING


class TrainOn(Enum):
    """``each``: a document for every turn that trains, which ends with it; ``last``: the last turn alone."""

    assistant = "assistant"
    last = "last"
    each = "each"
    all = "all"


class Broken(Enum):
    """What becomes of a row that cannot be used."""

    refuse = "refuse"
    skip = "skip"


class Overlong(Enum):
    """What becomes of a conversation that is longer than a sequence. ``truncate``: its end is left out."""

    truncate = "truncate"
    drop = "drop"
    refuse = "refuse"


class SpecialWords(Enum):
    """What the tokenizer's special words are in the text of a message."""

    text = "text"
    refuse = "refuse"
    control = "control"


@dataclass(frozen=True)
class TurnsData(DataConfig):
    """What conversations and prompts share. ``template_date`` is what a template gets for today."""

    path: str = MISSING  # a file, a directory or a glob, of JSON lines or Parquet
    format: TextFormat = TextFormat.auto
    domain_key: Optional[str] = None
    chat_template: Optional[str] = None  # a file; null: the tokenizer's own
    template_args: dict[str, Any] = field(default_factory=dict)  # as {enable_thinking: false}
    template_date: str = "2025-01-01"
    on_broken: Broken = Broken.refuse
    overlong: Overlong = Overlong.truncate
    special_words: SpecialWords = SpecialWords.text
    check_order: bool = True
    max_row_chars: int = field(default=500_000, metadata=at_least(1, 2**28))


@dataclass(frozen=True)
class ChatData(TurnsData):
    """Rows of messages. ``messages_key`` null: ``messages``, or else ``conversations``."""

    source: str = "chat"
    messages_key: Optional[str] = None
    tools_key: str = "tools"
    train_on: TrainOn = TrainOn.assistant


@dataclass(frozen=True)
class PromptCompletionData(TurnsData):
    """Rows of two columns, texts or lists of messages; the completion trains."""

    source: str = "prompt_completion"
    prompt_key: str = "prompt"
    completion_key: str = "completion"
    tools_key: str = "tools"

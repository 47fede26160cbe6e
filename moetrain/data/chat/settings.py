"""How rows become text that trains in part: of data groups, of parts of mixtures, of ``moetrain eval``."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from moetrain.bounds import at_least


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
class TurnsSettings:
    """Of rows of both kinds. ``template_date`` is what a template gets for today."""

    chat_template: Optional[str] = None  # a file; null: the tokenizer's own
    template_args: dict[str, Any] = field(default_factory=dict)  # as {enable_thinking: false}
    template_date: str = "2025-01-01"
    on_broken: Broken = Broken.refuse
    overlong: Overlong = Overlong.truncate
    special_words: SpecialWords = SpecialWords.text
    check_order: bool = True
    max_row_chars: int = field(default=500_000, metadata=at_least(1, 2**28))
    tools_key: str = "tools"


@dataclass(frozen=True)
class ChatSettings:
    """Of rows of messages. ``messages_key`` null: ``messages``, or else ``conversations``."""

    messages_key: Optional[str] = None
    train_on: TrainOn = TrainOn.assistant


@dataclass(frozen=True)
class PairSettings:
    """Of rows of a prompt and a completion."""

    prompt_key: str = "prompt"
    completion_key: str = "completion"


@dataclass(frozen=True)
class RowsSettings(TurnsSettings, ChatSettings, PairSettings):
    """Of rows whose kind an option tells."""

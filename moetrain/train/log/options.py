"""The ``tracker`` section of the configuration."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.missing import MISSING


class WandbMode(Enum):
    online = "online"
    offline = "offline"


@dataclass(frozen=True)
class TrackerConfig:
    """metrics.jsonl is always written; a tracker adds to it."""

    name: str = MISSING


@dataclass(frozen=True)
class JsonlTracker(TrackerConfig):
    name: str = "jsonl"


@dataclass(frozen=True)
class TensorboardTracker(TrackerConfig):
    name: str = "tensorboard"


@dataclass(frozen=True)
class WandbTracker(TrackerConfig):
    name: str = "wandb"
    mode: WandbMode = WandbMode.offline
    project: str = "moetrain"
    entity: Optional[str] = None
    tags: list[str] = field(default_factory=list)

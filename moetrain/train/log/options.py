"""The ``tracker`` section of the configuration."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.missing import MISSING


class WandbMode(Enum):
    online = "online"
    offline = "offline"


class Artifacts(Enum):
    """The checkpoints to upload: none, the last one at the end of a start, or all once complete."""

    none = "none"
    last = "last"
    all = "all"


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
    system_metrics: bool = True  # processor, memory, GPU and disk, by wandb itself
    artifacts: Artifacts = Artifacts.none

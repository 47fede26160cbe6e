"""The ``optim`` and ``schedule`` sections of the configuration."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.missing import MISSING


@dataclass(frozen=True)
class OptimConfig:
    """``lr`` is the peak; weight decay applies to matrices only."""

    name: str = MISSING
    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: Optional[float] = 1.0  # null: no clipping
    frozen: list[str] = field(default_factory=list)  # parameters that stay as they are, as "blocks.0.*"


@dataclass(frozen=True)
class AdamWConfig(OptimConfig):
    name: str = "adamw"


@dataclass(frozen=True)
class MuonConfig(OptimConfig):
    """Muon on hidden matrices, expert by expert; AdamW (``adamw_lr``) on embeddings, norms, routers."""

    name: str = "muon"
    lr: float = 0.02
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adamw_lr: float = 1e-3


class ScheduleKind(Enum):
    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"


@dataclass(frozen=True)
class ScheduleConfig:
    """A function of the step and ``horizon`` alone, never of ``train.steps``."""

    kind: ScheduleKind = ScheduleKind.cosine
    horizon: int = 400
    warmup_steps: int = 20
    decay_fraction: float = 0.2  # wsd only: the share of the horizon spent decaying
    min_ratio: float = 0.1  # of the peak

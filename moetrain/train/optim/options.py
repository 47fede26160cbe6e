"""The ``optim`` and ``schedule`` sections of the configuration."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.bounds import above, at_least, within
from moetrain.missing import MISSING


class Tables(Enum):
    """The state of tables whose rows are looked up (of feed_forward=peer, pkm): ``elementwise``, as AdamW
    keeps for any matrix; or one second moment a row, by ``row_adam`` or ``row_adagrad`` (without a first)."""

    elementwise = "elementwise"
    row_adam = "row_adam"
    row_adagrad = "row_adagrad"


@dataclass(frozen=True)
class OptimConfig:
    """``lr`` is the peak; weight decay applies to matrices only."""

    name: str = MISSING
    lr: float = field(default=1e-3, metadata=above(0))
    weight_decay: float = field(default=0.1, metadata=at_least(0))
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata=within(0, 1, open_high=True))
    eps: float = field(default=1e-8, metadata=above(0))
    clip_norm: Optional[float] = field(default=1.0, metadata=above(0))  # null: no clipping
    # parameters that stay as they are, as "blocks.0.*"; after "!": that are trained after all
    frozen: list[str] = field(default_factory=list)
    tables: Tables = Tables.elementwise


@dataclass(frozen=True)
class AdamWConfig(OptimConfig):
    name: str = "adamw"


@dataclass(frozen=True)
class AdamW8bitConfig(OptimConfig):
    """AdamW whose two moments are kept in 8 bits by bitsandbytes."""

    name: str = "adamw_8bit"
    min_8bit_size: int = field(default=4096, metadata=at_least(1))  # of whole parameters; smaller ones: fp32


@dataclass(frozen=True)
class MuonConfig(OptimConfig):
    """Muon on hidden matrices, expert by expert; AdamW (``adamw_lr``) on embeddings, norms, routers."""

    name: str = "muon"
    lr: float = 0.02
    momentum: float = field(default=0.95, metadata=within(0, 1, open_high=True))
    nesterov: bool = True
    ns_steps: int = field(default=5, metadata=at_least(1, 99))
    adamw_lr: float = field(default=1e-3, metadata=above(0))


class ScheduleKind(Enum):
    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"


@dataclass(frozen=True)
class ScheduleConfig:
    """A function of the step and ``horizon`` alone, never of ``train.steps``."""

    kind: ScheduleKind = ScheduleKind.cosine
    horizon: int = field(default=400, metadata=at_least(1))
    warmup_steps: int = field(default=20, metadata=at_least(0))
    # wsd only: the share of the horizon spent decaying
    decay_fraction: float = field(default=0.2, metadata=within(0, 1, open_low=True))
    min_ratio: float = field(default=0.1, metadata=within(0, 1))  # of the peak

"""The ``balance`` section of the typed configuration: losses on the experts' load, and controllers.

Both are known by name (``moetrain/moe/balance``), and their options are checked against the class that stands
beside each; docs/balance.md lists them.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from moetrain.bounds import at_least


class LossScope(Enum):
    """The tokens over which a loss takes loads and means; it does not change a loss without scopes."""

    micro = "micro"
    sequence = "sequence"
    global_batch = "global_batch"
    running = "running"


@dataclass(frozen=True)
class LossConfig:
    name: str = "switch"
    coef: float = field(default=0.01, metadata=at_least(0))
    scope: LossScope = LossScope.global_batch
    # the coefficient goes there linearly until step final_step
    final_coef: Optional[float] = field(default=None, metadata=at_least(0))
    final_step: int = field(default=0, metadata=at_least(0))
    # from this step on there is no such loss, as where it is of a warm-up alone; null: there always is
    stop_step: Optional[int] = field(default=None, metadata=at_least(0))
    options: dict[str, Any] = field(default_factory=dict)  # of the loss's own


@dataclass(frozen=True)
class BalanceConfig:
    losses: list[LossConfig] = field(default_factory=list)
    controllers: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> options of its own

"""The ``alarms`` section of the configuration: the thresholds; null switches an alarm off."""

from dataclasses import dataclass, field
from typing import Optional

from moetrain.bounds import above, at_least, within


@dataclass(frozen=True)
class AlarmsConfig:
    """An alarm is raised after ``patience`` bad steps in a row, and cleared after as many good ones."""

    enabled: bool = True
    patience: int = field(default=20, metadata=at_least(1, 10_000))
    # of the way from all tokens with the same experts (0) to perfect balance (1)
    collapse: Optional[float] = field(default=0.1, metadata=within(0, 1))
    # an expert without a token for so many steps
    dead_steps: Optional[int] = field(default=50, metadata=at_least(1))
    # of the entropy of a uniform router
    entropy: Optional[float] = field(default=0.001, metadata=within(0, 1))
    logit_rms: Optional[float] = field(default=30.0, metadata=at_least(0))
    # the share of a step that ranks of parallel.ep wait for the busiest of them
    imbalance_cost: Optional[float] = field(default=0.2, metadata=within(0, 1))
    # times its running mean
    loss_spike: Optional[float] = field(default=1.3, metadata=above(1, "it multiplies the running mean"))
    # of the median speed, for a minute
    throughput: Optional[float] = field(default=0.5, metadata=within(0, 1))

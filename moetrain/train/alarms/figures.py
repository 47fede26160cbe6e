"""What alarms see of a step, and what one of them finds.

Shapes: E experts of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.train.log.metrics import RoutingSummary

WHOLE = -1  # the place of an alarm that is of the run, not of a layer
Counts = Mapping[int, NDArray[np.int64]]  # a layer's place in the decoder -> a number for each expert [E]


@dataclass(frozen=True)
class StepFigures:
    """A step's row of ``metrics.jsonl``, and assignments per expert: wanted, and computed after capacity."""

    row: Mapping[str, Any]
    demand: Counts
    computed: Counts

    @staticmethod
    def of(row: Mapping[str, Any], routing: RoutingSummary) -> StepFigures:
        demand = {layer: counts_E.numpy() for layer, counts_E in routing.demand.items()}
        return StepFigures(row, demand, {layer: n_E.numpy() for layer, n_E in routing.counts.items()})

    @property
    def step(self) -> int:
        return int(self.row["step"])


@dataclass(frozen=True)
class Reading:
    """What an alarm reads at one place: whether it is bad, and why, as a phrase."""

    bad: bool
    value: float
    why: str = ""

"""A temperature that falls over the steps of training."""

from __future__ import annotations

from enum import Enum


class Decay(Enum):
    """``exponential``: by equal factors a step; ``linear``: by equal differences."""

    exponential = "exponential"
    linear = "linear"


def annealed(start: float, end: float, steps: int, step: int, decay: Decay) -> float:
    """From ``start`` at step 0 to ``end`` at step ``steps`` and after; ``end`` throughout for 0 steps."""
    share = min(step / steps, 1.0) if steps else 1.0
    if decay is Decay.linear:
        return start + share * (end - start)
    return float(start * (end / start) ** share)

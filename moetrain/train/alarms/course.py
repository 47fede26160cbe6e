"""Alarms on the course of a run: its loss and its speed."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from moetrain.train.alarms.figures import WHOLE, Reading, StepFigures
from moetrain.train.log.monitor import LossMonitor

_FIRST, _KEPT = 50, 200  # steps before a speed can be judged, and those whose median it is held to
_LASTING = 60.0  # seconds


class LossSpike:
    """The loss is not finite, or more than ``limit`` times its running mean (``monitor``)."""

    name = "loss_spike"
    patience = 1

    def __init__(self, limit: float) -> None:
        self.monitor = LossMonitor(limit)

    def look(self, figures: StepFigures) -> dict[int, Reading]:
        loss, mean = float(figures.row["train/loss"]), self.monitor.mean
        bad = self.monitor.check(loss) is not None
        return {WHOLE: Reading(bad, loss, f"the loss is {loss:.4g}, its running mean {mean:.4g}")}


class SlowSteps:
    """Tokens per second are less than the share ``limit`` of their median, for a minute at least.

    A speed that is too slow does not enter the median. A run that goes on may do so elsewhere, and begins
    anew.
    """

    name = "throughput"
    resumes = False

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._speeds: deque[float] = deque(maxlen=_KEPT)
        self._slow_since: float | None = None  # seconds, of the rows' own clock

    def look(self, figures: StepFigures) -> dict[int, Reading]:
        speed = float(figures.row["tokens_per_second"])
        usual = median(self._speeds) if len(self._speeds) >= _FIRST else math.nan
        now = float(figures.row["time"])
        if speed < self._limit * usual:
            self._slow_since = now if self._slow_since is None else self._slow_since
        else:
            self._slow_since = None
            self._speeds.append(speed)
        bad = self._slow_since is not None and now - self._slow_since >= _LASTING
        return {WHOLE: Reading(bad, speed, f"{speed:.4g} tokens/s, where {usual:.4g} were usual")}

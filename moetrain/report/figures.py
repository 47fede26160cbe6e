"""One number a run, as comparisons show it."""

from __future__ import annotations

import math

import numpy as np

from moetrain.report.runs import RunData

KEY = "val/bits_per_byte"
ROUTING = {
    "load_cv": "load variation", "entropy": "entropy (nats)", "drop_rate": "drop rate",
    "experts_per_token": "experts/token",
}  # fmt: skip


def late_mean(run: RunData, name: str) -> float:
    """``moe/<layer>/<name>``, the mean over layers and over the last tenth of the steps; NaN without any."""
    values = [run.series(f"moe/{layer}/{name}")[1] for layer in run.layers(name)]
    return float(np.mean([v[-max(1, len(v) // 10) :].mean() for v in values])) if values else math.nan


def step_time(run: RunData) -> float:
    """Milliseconds a step, by the median of the steps' own speeds: a pause of the machine does not count."""
    tokens, steps = run.last("tokens"), run.last("step")
    speeds = run.series("tokens_per_second")[1]
    return 1e3 * tokens / steps / float(np.median(speeds)) if len(speeds) and steps else math.nan

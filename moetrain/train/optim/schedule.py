"""Learning-rate schedules: a pure function of the step and the horizon, never of how long the run lasts."""

from __future__ import annotations

import math

from moetrain.train.optim.options import ScheduleConfig, ScheduleKind
from moetrain.train.optim.rules import check_schedule


def lr_factor(cfg: ScheduleConfig, step: int) -> float:
    """What multiplies the peak learning rate at ``step`` (counted from 0), in [0, 1].

    Linear warm-up over ``warmup_steps``: step s gets (s + 1) / warmup_steps, so the first step learns already
    and the last warm-up step is at the peak. Then, with ``min_ratio`` m at the horizon and ever after:

    cosine    half a cosine from 1 down to m.
    wsd       1, then a straight line down to m over the last ``decay_fraction`` of the horizon
              (Hu et al. 2024, MiniCPM; the linear tail is Hagele et al. 2024's).
    constant  1.

    Raises UserError for a schedule that is not possible, and ValueError for a negative step.
    """
    check_schedule(cfg)
    if step < 0:
        raise ValueError(f"step {step} is negative")
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    if cfg.kind is ScheduleKind.constant:
        return 1.0
    if step >= cfg.horizon:
        return cfg.min_ratio
    if cfg.kind is ScheduleKind.cosine:
        progress = (step - cfg.warmup_steps) / (cfg.horizon - cfg.warmup_steps)
        return cfg.min_ratio + (1 - cfg.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    length = min(cfg.decay_fraction * cfg.horizon, cfg.horizon - cfg.warmup_steps)
    left = min(1.0, (cfg.horizon - step) / length) if length else 1.0
    return cfg.min_ratio + (1 - cfg.min_ratio) * left

"""What an optimizer and a schedule refuse of their settings; composing a config needs no torch for it."""

from __future__ import annotations

from moetrain.bounds import check_ranges
from moetrain.errors import UserError
from moetrain.train.optim.options import OptimConfig, ScheduleConfig


def check_optim(cfg: OptimConfig) -> None:
    """Raise UserError naming the first key whose value is not possible."""
    check_ranges(cfg, "optim")
    betas = list(cfg.betas)
    if len(betas) != 2:
        raise UserError(f"optim.betas={betas} must be two numbers, as in [0.9,0.95]")


def check_schedule(cfg: ScheduleConfig) -> None:
    """Raise UserError naming the first key whose value is not possible."""
    check_ranges(cfg, "schedule")
    if cfg.warmup_steps > cfg.horizon:
        raise UserError(
            f"schedule.warmup_steps={cfg.warmup_steps} exceeds schedule.horizon={cfg.horizon}: "
            "the horizon counts the warm-up too"
        )

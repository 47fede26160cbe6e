"""What an optimizer and a schedule refuse of their settings; composing a config needs no torch for it."""

from __future__ import annotations

from moetrain.bounds import check_ranges
from moetrain.errors import UserError
from moetrain.packages import is_installed
from moetrain.train.optim.options import AdamW8bitConfig, OptimConfig, ScheduleConfig, Tables


def check_optim(cfg: OptimConfig) -> None:
    """Raise UserError naming the first key whose value is not possible."""
    check_ranges(cfg, "optim")
    betas = list(cfg.betas)
    if len(betas) != 2:
        raise UserError(f"optim.betas={betas} must be two numbers, as in [0.9,0.95]")
    if not isinstance(cfg, AdamW8bitConfig):
        return
    if cfg.tables is not Tables.elementwise:
        raise UserError(
            f"optim.tables={cfg.tables.name} is of optim=adamw and muon: with optim=adamw_8bit set "
            "optim.tables=elementwise"
        )
    if not is_installed("bitsandbytes"):
        raise UserError(
            "optim=adamw_8bit needs the package bitsandbytes, which is not installed: "
            "pip install 'moetrain[bitsandbytes]', or set optim=adamw"
        )


def check_schedule(cfg: ScheduleConfig) -> None:
    """Raise UserError naming the first key whose value is not possible."""
    check_ranges(cfg, "schedule")
    if cfg.warmup_steps > cfg.horizon:
        raise UserError(
            f"schedule.warmup_steps={cfg.warmup_steps} exceeds schedule.horizon={cfg.horizon}: "
            "the horizon counts the warm-up too"
        )

"""``moetrain upcycle``: an MoE model from a dense one."""

from __future__ import annotations

from moetrain.commands.composed import composed
from moetrain.config.validate import validate_upcycle
from moetrain.convert.options import UpcycleConfig


def run(args: list[str]) -> int:
    cfg = composed("upcycle", UpcycleConfig, args)
    if cfg is None:
        return 0
    validate_upcycle(cfg)
    from moetrain.config.stored import trained_config
    from moetrain.convert.upcycling import upcycle

    return upcycle(cfg, trained_config)

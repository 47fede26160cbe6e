"""``moetrain verify``: a layout against one process."""

from __future__ import annotations

from moetrain.commands.composed import composed, refuse_ranks
from moetrain.config.layout import of_layout
from moetrain.config.validate import smallest_world, validate_verify
from moetrain.verify.options import VerifyConfig


def run(args: list[str]) -> int:
    cfg = composed("verify", VerifyConfig, args)
    if cfg is None:
        return 0
    refuse_ranks("verify", "starts its own ranks")
    world = cfg.verify.world or smallest_world(cfg.parallel)
    cfg = of_layout(cfg, world)
    validate_verify(cfg)
    from moetrain.verify.command import verify

    return verify(cfg, world)

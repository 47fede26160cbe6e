"""The layout of a run whose number of ranks changes: the largest sizes that fit the ranks that are there."""

from __future__ import annotations

from dataclasses import replace

from moetrain.errors import UserError
from moetrain.parallel.options import ParallelConfig
from moetrain.parallel.rules import check_layout


def fitted(cfg: ParallelConfig, world: int, num_experts: int) -> ParallelConfig:
    """``cfg`` for ``world`` ranks and layers of ``num_experts``: itself where it fits, else by this rule.

    Data first: ``dp_shard``, where it is set, becomes the largest divisor of the ranks that is no larger, and
    ``dp_replicate`` takes the rest; where it is not, ``dp_replicate`` becomes such a divisor, and shards fill
    the rest. Then ``ep`` becomes the largest number, no larger, that the layout's rules accept: one that
    divides the ranks of a replica and the experts. ``cfg`` is in its ranges.
    """
    if _fits(cfg, world, num_experts):
        return cfg
    if cfg.dp_shard is None:
        data = replace(cfg, dp_replicate=_divisor(world, cfg.dp_replicate))
    else:
        shard = _divisor(world, cfg.dp_shard)
        data = replace(cfg, dp_replicate=world // shard, dp_shard=shard)
    for ep in range(min(cfg.ep, world), 0, -1):
        candidate = replace(data, ep=ep, overlap=cfg.overlap if ep > 1 else 1)
        if _fits(candidate, world, num_experts):
            return candidate
    return cfg  # wrong for any number of ranks, as the rules will say


def _divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` up to ``most``, which is at least 1."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)


def _fits(cfg: ParallelConfig, world: int, num_experts: int) -> bool:
    try:
        check_layout(cfg, world, num_experts)
    except UserError:
        return False
    return True

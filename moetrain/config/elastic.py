"""``parallel.elastic``: a config for the ranks of this start, be they more or fewer than those of the last.

The layout follows :func:`moetrain.parallel.elastic.fitted`. The tokens of a step and their order stay; what
a rank takes at once becomes smaller where its share is no multiple of it, and there are as many micro-batches
as make up the share.
"""

from __future__ import annotations

import math
from dataclasses import replace

from moetrain.bounds import check_ranges
from moetrain.errors import UserError
from moetrain.moe.slices import Slices
from moetrain.parallel.elastic import fitted
from moetrain.train.options import TrainConfig


def for_ranks(cfg: TrainConfig, world: int) -> tuple[TrainConfig, list[str]]:
    """``cfg`` for ``world`` ranks, and what was changed; ``cfg`` itself without ``parallel.elastic``.

    Raises UserError where the ranks cannot share a step's sequences equally.
    """
    if not cfg.parallel.elastic:
        return cfg, []
    check_ranges(cfg)
    experts = math.gcd(*cfg.model.layer_experts) or cfg.model.num_experts  # what ep must divide
    if widths := cfg.model.expert_widths:
        experts = Slices.of(widths).total
    parallel = fitted(cfg.parallel, world, experts)
    micro = _micro_batch(cfg, world)
    lines = [
        f"parallel.elastic: {key}={now} on {world} rank(s), where {asked} was asked for"
        for key, asked, now in (
            ("parallel.dp_replicate", cfg.parallel.dp_replicate, parallel.dp_replicate),
            ("parallel.dp_shard", cfg.parallel.dp_shard, parallel.dp_shard),
            ("parallel.ep", cfg.parallel.ep, parallel.ep),
            ("parallel.overlap", cfg.parallel.overlap, parallel.overlap),
            ("train.micro_batch_size", cfg.train.micro_batch_size, micro),
        )
        if asked != now
    ]
    return replace(cfg, parallel=parallel, train=replace(cfg.train, micro_batch_size=micro)), lines


def _micro_batch(cfg: TrainConfig, world: int) -> int:
    """The largest micro-batch up to the one asked for that divides a rank's share into whole groups."""
    tokens, seq_len, micro = cfg.train.global_batch_tokens, cfg.data.seq_len, cfg.train.micro_batch_size
    sequences = tokens // seq_len
    if tokens % seq_len or sequences % world:
        raise UserError(
            f"parallel.elastic: train.global_batch_tokens={tokens} is {tokens / seq_len:g} sequences of "
            f"data.seq_len={seq_len}, which {world} ranks cannot share equally: start a number of ranks that "
            "divides them, or choose a batch that every number of ranks divides"
        )
    share, group = sequences // world, cfg.router.group
    unit = int(group) if group.isdecimal() and int(group) else 1
    sizes = [size for size in range(min(micro, share), 0, -1) if share % size == 0 and size % unit == 0]
    return sizes[0] if sizes else micro  # the routing group's rule says what is wrong

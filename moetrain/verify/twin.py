"""The scaled-down twin of a config: the same structure, small prime sizes, fp64, and few ranks.

An engine that computes in fp32 whatever it is told has a twin in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from moetrain.models.attention import SHIPPED
from moetrain.models.attention_options import GatedDeltaConfig
from moetrain.models.feed_forward import ALIKE
from moetrain.models.options import LATENT, AttentionBackend, ModelConfig, attention_kinds
from moetrain.moe.options import RouterConfig
from moetrain.moe.slices import Slices
from moetrain.parallel.options import ExpertDispatch, ParallelConfig
from moetrain.train.deepspeed.options import DeepSpeedConfig
from moetrain.train.options import EngineConfig, Precision, TrainConfig

SEQ = 11  # positions of a sequence
VOCAB = 211
_SEQUENCES = 8  # of a step, at least
_CLIP = 0.01  # far below any gradient's norm here: clipping is always active
_ROWS = 17  # experts.max_rows_per_rank, where it is set: small enough for several rounds


@dataclass(frozen=True)
class Twin:
    """``cfg`` is laid out over ``world`` ranks; a step has ``sequences``, alike on every rank."""

    cfg: TrainConfig
    world: int
    sequences: int

    def reference(self) -> Twin:
        """What one process measures: nothing of a layout but the number of its ranks, which batches go by."""
        return replace(self, cfg=replace(self.cfg, parallel=ParallelConfig(), engine=EngineConfig()))

    def alone(self) -> TrainConfig:
        """The config of one process."""
        cfg = self.reference().cfg
        return replace(cfg, train=replace(cfg.train, recompute=False))


def twin_of(cfg: TrainConfig, world: int, most_ranks: int) -> Twin:
    """What is run to verify ``cfg`` on ``world`` ranks; on more than ``most_ranks`` where axes need it."""
    parallel, ranks = _layout(cfg.parallel, world, most_ranks)
    model = _with_experts_sharded_alike(_model(cfg.model), cfg, world, parallel, ranks)
    group = 2 if cfg.router.group.isdecimal() else 1
    unit = 2 * group * ranks
    sequences = unit * math.ceil(_SEQUENCES / unit)
    router = replace(
        _with_local_experts(cfg, parallel.ep, sequences // ranks),
        group="2" if group == 2 else cfg.router.group,
        min_capacity=min(cfg.router.min_capacity, 1),  # else no capacity would ever drop anything
        rounding_tile=min(cfg.router.rounding_tile, 2),  # nor would a sequence hold a tile
    )
    experts = cfg.experts
    if experts.max_rows_per_rank is not None:
        experts = replace(experts, max_rows_per_rank=_ROWS)
    optim = cfg.optim if cfg.optim.clip_norm is None else replace(cfg.optim, clip_norm=_CLIP)
    train = replace(
        cfg.train, precision=_precision(cfg), compile=False, device="cpu", threads=1, spike_factor=None
    )
    small = replace(
        cfg,
        model=model,
        router=router,
        experts=experts,
        optim=optim,
        parallel=parallel,
        train=train,
    )
    return Twin(small, ranks, sequences)


def _with_local_experts(cfg: TrainConfig, ep: int, share: int) -> RouterConfig:
    """A local repair's devices are the twin's ranks of ``ep``, where they are those of the layout."""
    router = cfg.router
    if not router.repair.is_local:
        return router
    own = router.local_devices in (None, cfg.parallel.ep)
    return replace(router, local_devices=ep if own else router.local_devices, local_sequences=share)


def _precision(cfg: TrainConfig) -> Precision:
    """ZeRO-1 and 2 keep master weights in fp32."""
    in_fp32 = isinstance(cfg.engine, DeepSpeedConfig) and cfg.engine.zero_stage > 0
    return Precision.fp32 if in_fp32 else Precision.fp64


def dp_shard(parallel: ParallelConfig, world: int) -> int:
    """Its degree; an unset one fills the world."""
    return world // parallel.dp_replicate if parallel.dp_shard is None else parallel.dp_shard


def _model(m: ModelConfig) -> ModelConfig:
    """Two MoE layers where there are as many; all experts, since routers' options refer to their number.

    A plug-in's layers may go by their places, and all of them stay where they are; so do layers that differ.
    """
    own = m.feed_forward in ALIKE and SHIPPED.issuperset(attention_kinds(m))
    alike = own and not (m.layer_experts or m.layer_widths)
    widths = tuple(3 * slices for slices in Slices.of(m.expert_widths).per_expert) if m.expert_widths else ()
    every, dense = (min(m.moe_every, 2), min(m.first_dense, 1)) if alike else (m.moe_every, m.first_dense)
    least = max(dense + 2 * every, len(m.attention_pattern))
    length = m.rope_scaling.original_max_positions
    return replace(
        m,
        vocab_size=VOCAB,
        d_model=13,
        num_layers=min(m.num_layers, least) if alike else m.num_layers,
        first_dense=dense,
        moe_every=every,
        **_heads(m),
        gated_delta=_small_delta(m),
        attention_backend=AttentionBackend.auto,  # the run's device may have what a CPU has not
        d_ff=11,
        d_ff_expert=max(_small(m.layer_widths) or widths, default=7),
        expert_widths=widths,
        layer_widths=_small(m.layer_widths),
        num_shared_experts=min(m.num_shared_experts, 2),
        d_ff_shared=None if m.d_ff_shared is None else 5,
        rope_fraction=1.0 if m.rope_fraction == 1 else 0.5,  # of a head_dim of 4
        sliding_window=None if m.sliding_window is None else min(m.sliding_window, 5),
        window_pattern=tuple(dict.fromkeys(m.window_pattern)),
        future=replace(m.future, layers=min(m.future.layers, 2)),
        rope_scaling=m.rope_scaling if length is None else replace(m.rope_scaling, original_max_positions=5),
    )


def _small_delta(m: ModelConfig) -> GatedDeltaConfig:
    """Of a model without such layers: as it is."""
    delta = m.gated_delta
    if "gated_delta" not in attention_kinds(m):
        return delta
    keys = min(delta.num_key_heads, 2)
    values = keys * min(delta.num_value_heads // delta.num_key_heads, 2)
    return replace(delta, num_key_heads=keys, num_value_heads=values, key_head_dim=3, value_head_dim=5)


def _heads(m: ModelConfig) -> dict[str, Any]:
    """Few and narrow ones, grouped or made of a narrow vector as they were."""
    if m.attention == LATENT:
        wide = m.latent.v_head_dim > m.latent.qk_nope_head_dim + m.latent.qk_rope_head_dim
        latent = replace(
            m.latent,
            q_lora_rank=None if m.latent.q_lora_rank is None else 5,
            kv_lora_rank=6,
            qk_nope_head_dim=3,
            qk_rope_head_dim=4,
            v_head_dim=9 if wide else 5,
        )
        return {"num_heads": min(m.num_heads, 3), "num_kv_heads": None, "latent": latent}
    kv = m.num_heads if m.num_kv_heads is None else m.num_kv_heads
    kv_heads = min(kv, 2)
    return {"num_heads": kv_heads * min(m.num_heads // kv, 3), "num_kv_heads": kv_heads, "head_dim": 4}


def _small(widths: tuple[int, ...]) -> tuple[int, ...]:
    """As different as they were: the i-th smallest is 2 i + 5."""
    return tuple(2 * sorted(set(widths)).index(width) + 5 for width in widths)


def _differ(m: ModelConfig) -> bool:
    return bool(m.layer_experts or m.layer_widths or m.expert_widths)


def _layout(parallel: ParallelConfig, world: int, most_ranks: int) -> tuple[ParallelConfig, int]:
    """The same axes, fewer ranks: the largest degree falls to the least of its kind, until all fit.

    A group whose rows go by way of nodes keeps two nodes, of two ranks where there are as many.
    """
    degrees = [parallel.dp_replicate, dp_shard(parallel, world) // parallel.ep, parallel.ep]
    levels = parallel.dispatcher is ExpertDispatch.hierarchical
    least = [
        *map(_smallest_factor, degrees[:2]),
        4 if levels and parallel.ep % 4 == 0 else _smallest_factor(parallel.ep),
    ]
    while math.prod(degrees) > most_ranks:
        reducible = [axis for axis in range(3) if least[axis] < degrees[axis]]
        if not reducible:
            break
        largest = max(reducible, key=lambda axis: degrees[axis])
        degrees[largest] = least[largest]
    replicate, efsdp, ep = degrees
    node = max(1, ep // 2) if levels else None
    return (
        replace(parallel, dp_replicate=replicate, dp_shard=efsdp * ep, ep=ep, ranks_per_node=node),
        math.prod(degrees),
    )


def _smallest_factor(number: int) -> int:
    return next((f for f in range(2, number + 1) if number % f == 0), 1)


def _with_experts_sharded_alike(
    m: ModelConfig, cfg: TrainConfig, world: int, small: ParallelConfig, ranks: int
) -> ModelConfig:
    """Where ranks hold too few experts to go round, FSDP cuts through them; so it does in the twin then."""
    local = cfg.model.num_experts // cfg.parallel.ep
    ways, small_ways = (
        size // (p.dp_replicate * p.ep) for p, size in ((cfg.parallel, world), (small, ranks))
    )
    if cfg.parallel.ep == 1 or local % ways == 0 or _differ(m):
        return m
    groups = cfg.router.expert_groups()
    fitting = (
        experts
        for experts in range(m.num_experts, 0, -small.ep)
        if experts % groups == 0 and experts // small.ep % small_ways
    )
    width, hidden = small_ways * m.d_model, small_ways * m.d_ff_expert
    return replace(m, num_experts=next(fitting, m.num_experts), d_model=width, d_ff_expert=hidden)

"""When a layer's experts compete for tokens: a schedule that is the same on every rank.

CompeteSMoE (Nguyen et al. 2025, arXiv:2505.13380) draws it for the whole run ahead. A router does not know
how long a run is, so here it is drawn for ``SPAN`` steps at a time, as a function of the seed alone.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from moetrain.moe.context import RouterContext

SPAN = 256  # steps that are drawn together
_SALT = 0xC0E7


def competes(ctx: RouterContext, rate: float, most_layers: int | None, warmup_steps: int) -> bool:
    """Whether the experts of the context's layer compete in its step. Nothing waits for a device.

    Each layer competes in a share ``rate`` of the steps from ``warmup_steps`` on. Where more than
    ``most_layers`` would in one step, the later layer moves to the last step before with room, else to the
    first one after; a span without room drops it.
    """
    since = ctx.step - warmup_steps
    if since < 0:
        return False
    layers = ctx.moe_layers if ctx.layer in ctx.moe_layers else (ctx.layer,)
    drawn = _drawn(ctx.seed, since // SPAN, layers, rate, most_layers)
    return drawn[layers.index(ctx.layer)][since % SPAN]


@lru_cache(maxsize=32)
def _drawn(
    seed: int, span: int, layers: tuple[int, ...], rate: float, most_layers: int | None
) -> tuple[tuple[bool, ...], ...]:
    most = len(layers) if most_layers is None else most_layers
    taken = [0] * SPAN
    return tuple(_of_layer(seed, span, layer, rate, most, taken) for layer in layers)


def _of_layer(seed: int, span: int, layer: int, rate: float, most: int, taken: list[int]) -> tuple[bool, ...]:
    """The layer's steps, which ``taken`` then counts too."""
    ctx = RouterContext(0, 0, torch.empty(0, dtype=torch.int64), seed=seed, layer=layer)
    mine = [False] * SPAN
    for wanted, noise in enumerate(ctx.common_uniform(SPAN, span, _SALT).tolist()):
        if noise >= rate:
            continue
        nearest = (wanted, *range(wanted - 1, -1, -1), *range(wanted + 1, SPAN))
        step = next((step for step in nearest if taken[step] < most and not mine[step]), None)
        if step is not None:
            mine[step] = True
            taken[step] += 1
    return tuple(mine)

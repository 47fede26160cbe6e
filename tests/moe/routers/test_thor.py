"""THOR's draws: even, anew for each step, layer and seed, one for all that goes together."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moetrain.moe import RouterContext, build_router

E, B, S = 7, 3, 11


def experts(ctx: RouterContext, level: str, training: bool = True, num_experts: int = E) -> Tensor:
    """[B, S]."""
    router = build_router("thor", d_model=2, num_experts=num_experts, level=level, eval_level=level)
    a = router.train(training)(torch.zeros(ctx.batch * ctx.seq, 2), ctx).assignment
    assert (a.weights_N == 1).all()
    ids_T = torch.full((ctx.batch * ctx.seq,), -1)
    ids_T[a.token_ids_N] = a.expert_ids_N()
    return ids_T.view(ctx.batch, ctx.seq)


@pytest.mark.parametrize("level", ["step", "sequence", "token"])
def test_draws_are_even(level):
    shape = {"step": (1, 1), "sequence": (700, 1), "token": (1, 700)}[level]
    calls = 210 if level == "step" else 1
    ctx = replace(RouterContext.default(*shape), seed=3)
    ids = [experts(replace(ctx, step=n, layer=n % 3), level).flatten() for n in range(calls)]
    found = Counter(torch.cat(ids).tolist())
    even = found.total() / E
    # chi-square with 6 degrees of freedom: above 35 once in 200,000 times
    assert sum((found[e] - even) ** 2 / even for e in range(E)) < 35


def test_what_goes_together_and_what_does_not():
    ctx = replace(RouterContext.default(B, S), seed=3, step=5, layer=1)
    assert len(experts(ctx, "step").unique()) == 1
    by_sequence = experts(ctx, "sequence")
    assert (by_sequence == by_sequence[:, :1]).all()
    many = replace(RouterContext.default(60, S), seed=3, step=5)
    assert len(experts(many, "sequence")[:, 0].unique()) == E
    assert len(experts(ctx, "token").unique()) == E
    for level in ("step", "sequence", "token"):
        others = [replace(ctx, step=step, layer=layer, seed=seed)
                  for step in range(5, 9) for layer in range(3) for seed in (3, 4)]  # fmt: skip
        assert len({tuple(experts(other, level).flatten().tolist()) for other in others}) > 4


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_generation_draws_as_a_whole_text_does(level):
    ctx = replace(RouterContext.default(B, S), seed=3)
    whole = experts(ctx, level, training=False)
    parts = [
        experts(replace(ctx, seq=size, seen=seen), level, training=False)
        for seen, size in ((0, 4), (4, 1), (5, 1), (6, 5))
    ]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_levels_of_training_and_evaluation_differ():
    router = build_router("thor", d_model=2, num_experts=E, level="step", eval_level="token")
    ctx, x_TD = RouterContext.default(B, S), torch.zeros(B * S, 2)
    assert math.prod(router(x_TD, ctx).demand_E.tolist()) == 0
    assert math.prod(router.eval()(x_TD, ctx).demand_E.tolist()) > 0

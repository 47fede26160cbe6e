"""DSelect-k against the products of its definition, one token, selector and expert at a time.

Shapes: T tokens, D model, E experts, K selectors, M binary choices a selector.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import SEEDS, dense_weights, normal, step_by_hand

from moetrain.moe import RouterContext, build_router

D, T = 5, 11


def router_of(num_experts, selectors, scale=1.0, seed=0, **options):
    """With codes of about ``scale`` steps' widths: below 1/2 mostly between, far above mostly decided."""
    router = build_router(
        "dselect_k", d_model=D, num_experts=num_experts, top_k=selectors, **options
    ).double()
    gamma = router.options.gamma
    with torch.no_grad():
        for i, p in enumerate(router.parameters()):
            p.copy_(normal(seed + i, *p.shape) * (scale * gamma if p.shape[0] > selectors else 1.0))
    return router


def by_hand(x_TD, parameters, num_experts, selectors, gamma):
    """(weights [T, E], selectors' choices [T, K, E]): binary numbers, products and sums of scalars."""
    mix_w, mix_b, code_w, code_b = parameters
    bits = math.ceil(math.log2(num_experts))
    weights, choices = [], []
    for x_D in x_TD:
        v = [torch.exp((mix_w[k] * x_D).sum() + mix_b[k]) for k in range(selectors)]
        rows = []
        for k in range(selectors):
            s = [
                step_by_hand((code_w[k * bits + m] * x_D).sum() + code_b[k * bits + m], gamma)
                for m in range(bits)
            ]
            row = []
            for e in range(num_experts):
                r = torch.ones((), dtype=torch.float64)
                for m, digit in enumerate(format(e, f"0{bits}b")):
                    r = r * (s[m] if digit == "1" else 1 - s[m])
                row.append(r)
            rows.append(row)
        choices.append(torch.stack([torch.stack(row) for row in rows]))
        weights.append(
            torch.stack(
                [sum(v[k] / sum(v) * rows[k][e] for k in range(selectors)) for e in range(num_experts)]
            )
        )
    return torch.stack(weights), torch.stack(choices)


def penalty_by_hand(choices_TKE, entropy_coef, reach_coef, power_of_two):
    total = 0.0
    for choice_KE in choices_TKE:
        for r_E in choice_KE:
            total = total - entropy_coef * sum(r * torch.log(r + 1e-6) for r in r_E)
            total = total + (0.0 if power_of_two else reach_coef / (1e-6 + sum(r_E)))
    return total / len(choices_TKE)


@pytest.mark.parametrize(
    ("num_experts", "selectors", "scale"), [(8, 2, 0.2), (5, 3, 0.2), (6, 1, 1.0), (2, 2, 0.5)]
)
@pytest.mark.parametrize("training", [True, False])
def test_weights_penalty_and_gradients(num_experts, selectors, scale, training):
    router = router_of(num_experts, selectors, scale, gamma=0.7, entropy_coef=0.3, reach_coef=0.4).train(
        training
    )
    x_TD, ctx = normal(90, T, D).requires_grad_(), RouterContext.default(1, T)
    leaves = [x_TD, *router.parameters()]
    assert len(leaves) == 5
    routing = router(x_TD, ctx)
    given_TE, choices_TKE = by_hand(x_TD, leaves[1:], num_experts, selectors, 0.7)
    torch.testing.assert_close(dense_weights(routing, T), given_TE.detach(), rtol=1e-12, atol=1e-15)
    assert routing.scores_TE.equal(dense_weights(routing, T))
    wanted = penalty_by_hand(choices_TKE, 0.3, 0.4, num_experts in (2, 8))
    torch.testing.assert_close(routing.penalty, wanted, rtol=1e-12, atol=0)
    cotangent_TE = normal(91, T, num_experts)
    a = routing.assignment
    ours = (a.weights_N * cotangent_TE[a.token_ids_N, a.expert_ids_N()]).sum() + routing.penalty
    theirs = (given_TE * cotangent_TE).sum() + wanted
    for mine, other in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@given(SEEDS, st.sampled_from([2, 4, 8, 16]), st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_weights_sum_to_one_where_every_code_is_an_expert(seed, num_experts, selectors):
    router = router_of(num_experts, selectors, 0.5, seed)
    routing = router(normal(seed + 9, T, D), RouterContext.default(1, T))
    torch.testing.assert_close(routing.scores_TE.sum(-1), torch.ones(T).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("selectors", [1, 3])
def test_decided_selectors_take_one_expert_each(selectors):
    router = router_of(8, selectors, scale=1e6)
    x_TD = normal(4, 200, D)
    routing = router(x_TD, RouterContext.default(1, 200))
    taken_T = torch.bincount(routing.assignment.token_ids_N, minlength=200)
    assert int(taken_T.max()) == selectors
    assert float(routing.penalty.detach().abs()) < 1e-5  # of one-hot choices: -log(1 + 1e-6)
    if selectors == 1:
        assert torch.allclose(routing.assignment.weights_N, torch.ones(200).double(), rtol=0, atol=1e-15)


def test_it_begins_dense():
    router = build_router("dselect_k", d_model=64, num_experts=8).double()
    assert router(normal(5, T, 64), RouterContext.default(1, T)).assignment.counts_E.tolist() == [T] * 8


def test_the_penalty_is_of_valid_tokens():
    router, x_TD = router_of(5, 2, 0.2), normal(6, 2 * T, D)
    valid_T = torch.rand(2 * T, generator=torch.Generator().manual_seed(1)) < 0.5
    ctx = RouterContext.default(2, T)
    some = router(x_TD, replace(ctx, valid_T=valid_T)).penalty
    alone = router(x_TD[valid_T], RouterContext.default(1, int(valid_T.sum()))).penalty
    torch.testing.assert_close(some, alone, rtol=1e-12, atol=0)
    nothing = router(x_TD, replace(ctx, valid_T=torch.zeros_like(valid_T))).penalty
    assert float(nothing.detach()) == 0

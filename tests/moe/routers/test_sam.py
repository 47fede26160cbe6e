"""SAM against loops over tokens, groups and experts.

Shapes: T tokens, D model, E experts, M groups, K top-k.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import SEEDS, chosen, dense_weights, looking_at_logits, normal

from moetrain.moe import RouterContext, build_router

T = 13
SIZES = [(6, 2, 1), (6, 3, 2), (6, 2, 3), (8, 4, 2), (5, 1, 2), (4, 4, 1)]  # experts, groups, top-k


def by_hand(z_TE, groups, top_k):
    """(weights [T][E], the alignment loss of each token [T]), in floats."""
    weights, losses = [], []
    for z_E in z_TE:
        powers = [math.exp(z - max(z_E)) for z in z_E]
        p_E = [power / sum(powers) for power in powers]
        size = len(z_E) // groups
        sums = [sum(p_E[m * size : (m + 1) * size]) for m in range(groups)]
        own = range(sums.index(max(sums)) * size, (sums.index(max(sums)) + 1) * size)
        taken = sorted(own, key=lambda e, p=p_E: (-p[e], e))[:top_k]
        weights.append([p_E[e] if e in taken else 0.0 for e in range(len(z_E))])
        losses.append(sum(max(p - p_E[taken[-1]], 0.0) for e, p in enumerate(p_E) if e not in own))
    return weights, losses


@given(SEEDS, st.sampled_from(SIZES), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_best_of_the_best_group(seed, sizes, training):
    num_experts, groups, top_k = sizes
    z_TE = normal(seed, T, num_experts)
    router = looking_at_logits("sam", num_experts, num_groups=groups, top_k=top_k).train(training)
    routing = router(z_TE, RouterContext.default(1, T))
    weights, losses = by_hand(z_TE.tolist(), groups, top_k)
    torch.testing.assert_close(dense_weights(routing, T), torch.tensor(weights, dtype=torch.float64))
    assert float(routing.penalty.detach()) == pytest.approx(sum(losses) / T, rel=1e-12, abs=1e-15)
    devices_TM = chosen(routing, T).view(T, groups, -1).any(-1)
    assert devices_TM.sum(1).tolist() == [1] * T  # all experts of a token on one device


def test_gradients():
    """Of weights and of the loss, in which the least weight that is taken counts as a constant."""
    x_TD, ctx = normal(1, T, 5).requires_grad_(), RouterContext.default(1, T)
    router = build_router("sam", d_model=5, num_experts=6, num_groups=3, top_k=2).double()
    routing, cotangent_TE = router(x_TD, ctx), normal(2, T, 6)
    mask_TE = chosen(routing, T)
    p_TE = torch.exp(x_TD @ router.weight_ED.T)
    p_TE = p_TE / p_TE.sum(1, keepdim=True)
    theirs = (p_TE * cotangent_TE)[mask_TE].sum()
    for t in range(T):
        least = p_TE[t][mask_TE[t]].min().item()
        group = int(mask_TE[t].nonzero()[0]) // 2
        theirs = theirs + sum(
            7 / T * (p_TE[t, e] - least) for e in range(6) if e // 2 != group and p_TE[t, e].item() > least
        )
    a = routing.assignment
    ours = (a.weights_N * cotangent_TE[a.token_ids_N, a.expert_ids_N()]).sum() + 7 * routing.penalty
    assert float(routing.penalty.detach()) > 0
    leaves = [x_TD, router.weight_ED]
    for mine, other in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-13)


def test_the_loss_is_zero_where_no_expert_outside_is_better():
    router = looking_at_logits("sam", 4, num_groups=2, top_k=2)
    ctx = RouterContext.default(1, 1)
    for row, aligned in (
        ([3.0, 2.0, 1.0, 0.0], True),
        ([3.0, 0.0, 1.0, 0.5], False),
        ([2.0, 1.0, 1.0, 0.0], True),
    ):
        penalty = router(torch.tensor([row], dtype=torch.float64), ctx).penalty
        assert (float(penalty.detach()) == 0) is aligned


def test_the_loss_is_a_mean_over_valid_tokens():
    router, z_TE = looking_at_logits("sam", 6, num_groups=3, top_k=2), normal(3, T, 6)
    valid_T = torch.arange(T) % 3 > 0
    found = router(z_TE, replace(RouterContext.default(1, T), valid_T=valid_T)).penalty
    losses = by_hand(z_TE[valid_T].tolist(), 3, 2)[1]
    assert float(found.detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_a_bias_moves_group_and_expert():
    router, z_TE = looking_at_logits("sam", 6, num_groups=3, top_k=1), normal(4, T, 6)
    router.bias_E[3] = 10.0
    routing = router(z_TE, RouterContext.default(1, T))
    assert routing.demand_E.tolist() == [0, 0, 0, T, 0, 0]
    assert dense_weights(routing, T)[:, 3].equal(z_TE.softmax(-1)[:, 3])


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [((8, 2), 2), ((64, 8), 4), ((7, 2), 1), ((6, 1), 3), ((6, 2), 1), ((1, None), 1), ((128, 2), 8)],
)
def test_the_default_number_of_groups(sizes, groups):
    num_experts, top_k = sizes
    assert build_router("sam", d_model=3, num_experts=num_experts, top_k=top_k).num_groups == groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 4}, "router.num_groups=4 must divide num_experts=6: take"),
        ({"num_groups": 3, "top_k": 3}, "router.top_k=3 exceeds the 2 experts of one of router.num_groups=3"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_router("sam", d_model=3, num_experts=6, **options)

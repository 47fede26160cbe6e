"""Expert prototyping is as many Switch routers as there are prototypes, side by side.

Shapes: T tokens, D model, E experts, K prototypes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import SEEDS, dense_weights, looking_at_logits, normal

from moetrain.moe import RouterContext, build_router
from moetrain.moe.balance import LossTerm, StepTotals, count_ahead, total_loss


def by_hand(z_TE, prototypes):
    """Weights [T][E] and, a prototype, Switch's loss: floats and loops."""
    tokens, num_experts = len(z_TE), len(z_TE[0])
    size = num_experts // prototypes
    weights = [[0.0] * num_experts for _ in range(tokens)]
    losses = []
    for j in range(prototypes):
        mean, taken = [0.0] * size, [0] * size
        for t, z_E in enumerate(z_TE):
            block = z_E[j * size : (j + 1) * size]
            powers = [math.exp(z - max(block)) for z in block]
            p = [power / sum(powers) for power in powers]
            best = max(range(size), key=lambda e, p=p: (p[e], -e))
            weights[t][j * size + best] = p[best]
            taken[best] += 1
            mean = [m + value / tokens for m, value in zip(mean, p, strict=True)]
        losses.append(size * sum(m * n / tokens for m, n in zip(mean, taken, strict=True)))
    return weights, losses


@given(SEEDS, st.sampled_from([(6, 1), (6, 2), (6, 3), (6, 6), (8, 4)]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_best_of_each_prototype(seed, sizes, training):
    num_experts, prototypes = sizes
    z_TE = normal(seed, 13, num_experts)
    router = looking_at_logits("prototypes", num_experts, top_k=prototypes).train(training)
    routing = router(z_TE, RouterContext.default(1, 13))
    weights, _ = by_hand(z_TE.tolist(), prototypes)
    torch.testing.assert_close(dense_weights(routing, 13), torch.tensor(weights, dtype=torch.float64))
    per_prototype = routing.assignment.counts_E.view(prototypes, -1).sum(1)
    assert per_prototype.tolist() == [13] * prototypes


@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradient_are_those_of_separate_switches(training):
    """The columns of a prototype are a Switch router of their own, to the bit, and so are their gradients."""
    x_TD, ctx, cotangent_TE = normal(1, 17, 5), RouterContext.default(1, 17), normal(2, 17, 6)
    whole = build_router("prototypes", d_model=5, num_experts=6, top_k=3).double().train(training)
    routing = whole(x_TD, ctx)
    a = routing.assignment
    (a.weights_N * cotangent_TE[a.token_ids_N, a.expert_ids_N()]).sum().backward()
    for j in range(3):
        part = build_router("switch", d_model=5, num_experts=2).double().train(training)
        with torch.no_grad():
            part.weight_ED.copy_(whole.weight_ED[2 * j : 2 * j + 2])
        b = part(x_TD, ctx).assignment
        (b.weights_N * cotangent_TE[b.token_ids_N, 2 * j + b.expert_ids_N()]).sum().backward()
        assert a.counts_E[2 * j : 2 * j + 2].equal(b.counts_E)
        torch.testing.assert_close(whole.weight_ED.grad[2 * j : 2 * j + 2], part.weight_ED.grad)


def test_its_loss_is_the_sum_of_switch_losses():
    z_TE = normal(3, 2 * 11, 6)
    routing = looking_at_logits("prototypes", 6, top_k=3)(z_TE, RouterContext.default(2, 11))
    term = LossTerm("sum_over_k", 1.0, "global_batch")
    counts = count_ahead([{0: routing}], [term])
    value, _ = total_loss({0: routing}, [term], StepTotals(22.0, counts))
    assert float(value.detach()) == pytest.approx(sum(by_hand(z_TE.tolist(), 3)[1]), rel=1e-12)


def test_capacity_is_that_of_the_assignments():
    """k ceil(T / E), as in Hetu's gate, where E divides T: the earliest tokens stay."""
    z_TE = torch.zeros(12, 6, dtype=torch.float64)  # all go to the first of each of three prototypes
    router = looking_at_logits("prototypes", 6, top_k=3, capacity_factor=1.0, min_capacity=0)
    routing = router(z_TE, RouterContext.default(1, 12))
    assert routing.assignment.counts_E.tolist() == [6, 0, 6, 0, 6, 0]
    assert sorted(set(routing.assignment.token_ids_N.tolist())) == list(range(6))


def test_a_bias_moves_the_choice_within_its_prototype_alone():
    router = looking_at_logits("prototypes", 6, top_k=2)
    z_TE = normal(4, 13, 6)
    before = router(z_TE, RouterContext.default(1, 13))
    router.bias_E[5] = 10.0
    after = router(z_TE, RouterContext.default(1, 13))
    assert after.demand_E[5] == 13
    assert after.demand_E[:3].equal(before.demand_E[:3])
    padded = replace(RouterContext.default(1, 13), valid_T=torch.arange(13) < 7)
    assert router(z_TE, padded).demand_E.sum() == 14


def test_prototypes_divide_the_experts():
    with pytest.raises(ValueError, match="top_k=4 prototypes must divide num_experts=6: take"):
        build_router("prototypes", d_model=3, num_experts=6, top_k=4)

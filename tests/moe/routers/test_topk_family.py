"""What each router of a fixed number of experts a token promises: its paper's rule, written out.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import SEEDS, chosen, dense_weights, looking_at_logits, normal

from moetrain.moe import RouterContext
from moetrain.moe.topk_ops import first_max, softmax, top_ids


@given(SEEDS, st.integers(1, 9), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_ties_go_to_the_lower_index(seed, width, dtype):
    scores = normal(seed, 7, width).round().to(dtype)
    scores[0] = float("-inf")
    scores[1] = torch.tensor([0.0, -0.0] * width)[:width]
    k = 1 + seed % width
    rows = [sorted(range(width), key=lambda e, r=row: (-r[e], e))[:k] for row in scores.tolist()]
    assert top_ids(scores, k).tolist() == rows
    assert first_max(scores).tolist() == [row[0] for row in rows]


def test_softmax_of_what_is_out():
    out = float("-inf")
    found = softmax(torch.tensor([[1.0, out, 1.0], [out, out, out]]))
    assert found.tolist() == [[0.5, 0.0, 0.5], pytest.approx([1 / 3] * 3)]


def test_switch_is_one_expert_by_its_probability():
    z_TE = normal(0, 11, 5)
    routing = looking_at_logits("switch", 5)(z_TE, RouterContext.default(1, 11))
    p_TE = z_TE.softmax(-1)
    assert torch.equal(dense_weights(routing, 11), p_TE.where(p_TE == p_TE.amax(-1, keepdim=True), 0))


def test_switch_drops_the_last_over_capacity():
    router = looking_at_logits("switch", 3, capacity_factor=1.0, min_capacity=1)
    z_TE = torch.zeros(9, 3, dtype=torch.float64)
    z_TE[:, 1] = 50.0
    routing = router(z_TE, RouterContext.default(1, 9))
    assert routing.assignment.token_ids_N.tolist() == [0, 1, 2]
    assert routing.demand_E.tolist() == [0, 9, 0]


def test_batch_prioritized_keeps_the_tokens_of_highest_score():
    """Whatever their weight: here a token's second choice outlives another's first."""
    router = looking_at_logits(
        "topk", 3, top_k=2, capacity_factor=0.5, min_capacity=1, drop_order="batch_prioritized"
    )
    z_TE = torch.tensor([[1.0, 0.9, -9.0], [5.0, 1.0, -9.0], [0.0, 2.0, -9.0]], dtype=torch.float64)
    routing = router(z_TE, RouterContext.default(1, 3))
    assert routing.demand_E.tolist() == [3, 3, 0]
    pairs = set(
        zip(routing.assignment.expert_ids_N().tolist(), routing.assignment.token_ids_N.tolist(), strict=True)
    )
    assert pairs == {(0, 1), (1, 1)}


def test_gshard_keeps_the_second_by_chance():
    """Of 20,000 equal tokens the second is kept in min(1, 2 g2) of them, to 5 sigma."""
    tokens = 20_000
    z_E = torch.tensor([1.0, -0.2, -3.0], dtype=torch.float64)
    router = looking_at_logits("gshard", 3)
    routing = router(z_E.expand(tokens, 3), RouterContext.default(1, tokens))
    p_E = z_E.softmax(-1)
    g1, g2 = (p_E[:2] / p_E[:2].sum()).tolist()
    kept = routing.assignment.counts_E[1].item() / tokens
    assert abs(kept - 2 * g2) < 5 * math.sqrt(2 * g2 * (1 - 2 * g2) / tokens)
    assert routing.assignment.counts_E.tolist()[0] == tokens
    assert routing.assignment.counts_E[2] == 0
    for weights_T, wanted in (
        (routing.assignment.weights_N[:tokens], g1),
        (routing.assignment.weights_N[tokens:], g2),
    ):
        torch.testing.assert_close(weights_T, torch.full_like(weights_T, wanted), rtol=1e-12, atol=0)
    everyone = router.eval()(z_E.expand(tokens, 3), RouterContext.default(1, tokens))
    assert everyone.assignment.counts_E.tolist() == [tokens, tokens, 0]


def test_gshard_drops_no_first_choice_before_a_second():
    router = looking_at_logits("gshard", 2, second="all", capacity_factor=1.0, min_capacity=1)
    z_TE = torch.tensor([[0.1, 0.0]] * 3 + [[0.0, 0.1]] * 5, dtype=torch.float64)
    routing = router(z_TE, RouterContext.default(1, 8))
    pairs = set(
        zip(routing.assignment.expert_ids_N().tolist(), routing.assignment.token_ids_N.tolist(), strict=True)
    )
    assert pairs >= {(0, 0), (0, 1), (0, 2), *((1, t) for t in range(3, 8))}
    assert routing.assignment.counts_E.tolist() == [8, 8]
    tight = looking_at_logits("gshard", 2, second="all", capacity_factor=0.5, min_capacity=1)
    routing = tight(z_TE, RouterContext.default(1, 8))
    assert routing.assignment.token_ids_N.tolist() == [0, 1, 2, 3, 3, 4, 5, 6]


def test_gshard_sampling_draws_the_second_by_its_probability():
    tokens = 20_000
    z_E = torch.tensor([2.0, 0.3, 0.0, -0.5], dtype=torch.float64)
    router = looking_at_logits("gshard", 4, second="sampling")
    routing = router(z_E.expand(tokens, 4), RouterContext.default(1, tokens))
    share_E = z_E[1:].softmax(-1)
    found_E = routing.assignment.counts_E[1:] / tokens
    assert (found_E - share_E).abs().max() < 5 * 0.5 / math.sqrt(tokens)


def test_noisy_top_k_without_noise_is_softmax_over_the_chosen():
    z_TE = normal(1, 13, 5)
    noisy = looking_at_logits("noisy_topk", 5, top_k=3).eval()(z_TE, RouterContext.default(1, 13))
    plain = looking_at_logits("topk", 5, top_k=3, score="softmax_after")(z_TE, RouterContext.default(1, 13))
    assert torch.equal(noisy.assignment.token_ids_N, plain.assignment.token_ids_N)
    assert torch.equal(noisy.assignment.weights_N, plain.assignment.weights_N)
    assert noisy.load_TE is None


def test_the_load_is_the_probability_of_being_chosen_again():
    """Monte Carlo: expert 1's noise drawn anew 20,000 times, the others' kept."""
    router = looking_at_logits("noisy_topk", 4, top_k=2)
    torch.nn.init.normal_(router.noise_weight_ED, generator=torch.Generator().manual_seed(2))
    x_TE = normal(3, 1, 4)
    ctx = RouterContext.default(1, 1)
    load_E = router(x_TE, ctx).load_TE[0]
    clean_E = x_TE[0]
    std_E = torch.nn.functional.softplus(router.noise_weight_ED @ x_TE[0]) + 0.01
    noise_E = torch.special.ndtri(ctx.uniform((1, 4), 0x2015).double())[0]
    again = normal(4, 20_000)
    for e in range(4):
        noisy = (clean_E + std_E * noise_E).repeat(len(again), 1)
        noisy[:, e] = clean_E[e] + std_E[e] * again
        found = (noisy.topk(2).indices == e).any(1).double().mean().item()
        p = load_E[e].item()
        assert abs(found - p) < 5 * math.sqrt(max(p * (1 - p), 1e-4) / len(again))


def test_sigmoid_is_top_k_and_ignores_a_constant_bias():
    z_TE = normal(5, 17, 6)
    router = looking_at_logits("sigmoid", 6, renormalize=False)
    plain = router(z_TE, RouterContext.default(1, 17))
    assert torch.equal(chosen(plain, 17).nonzero()[:, 1].view(17, 2), z_TE.topk(2).indices.sort().values)
    router.bias_E += 3.0
    assert torch.equal(
        router(z_TE, RouterContext.default(1, 17)).assignment.weights_N, plain.assignment.weights_N
    )


@given(SEEDS, st.sampled_from([(6, 2, 2), (9, 3, 3), (10, 4, 2), (7, 7, 7), (5, 3, 1)]))
@settings(max_examples=30, deadline=None)
def test_grouped_takes_as_many_from_each_group(seed, shape):
    num_experts, k, groups = shape
    z_TE = 5 * normal(seed, 23, num_experts)
    router = looking_at_logits("grouped", num_experts, top_k=k, num_groups=groups)
    routing = router(z_TE, RouterContext.default(1, 23))
    mask_TMe = chosen(routing, 23).unflatten(1, (groups, -1))
    assert (mask_TMe.sum(-1) == k // groups).all()
    lowest_TM = z_TE.unflatten(1, (groups, -1)).where(mask_TMe, torch.inf).amin(-1)
    assert (z_TE.unflatten(1, (groups, -1)).where(~mask_TMe, -torch.inf).amax(-1) <= lowest_TM).all()
    device_load_M = routing.assignment.counts_E.view(groups, -1).sum(1)
    assert device_load_M.unique().numel() == 1
    assert torch.equal(dense_weights(routing, 23), z_TE.softmax(-1).where(chosen(routing, 23), 0))

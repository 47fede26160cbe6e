"""What the other routers promise beyond the invariants: their papers' rules, written out.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import SEEDS, assert_sigmoids, chosen, dense_weights, looking_at_logits, normal

from moetrain.moe import MoELayer, RouterContext, build_router


def test_cosine_sees_directions_only():
    router = build_router("cosine", d_model=5, num_experts=7, temperature=0.2).double()
    x_TD = normal(6, 9, 5)
    logits_TE = router.logits(x_TD)
    torch.testing.assert_close(router.logits(x_TD * torch.rand(9, 1).double() * 40), logits_TE)
    assert logits_TE.abs().max() <= 1 / 0.2 + 1e-12
    logits_TE.square().sum().backward()
    along_E = (router.centers_Ed.grad * router.centers_Ed).sum(-1)
    assert along_E.abs().max() < 1e-10
    assert router.centers_Ed.grad.norm() > 0.1


def test_hash_is_a_function_of_the_id_and_even():
    router = build_router("hash", d_model=3, num_experts=8)
    ids_T = torch.arange(40_000)
    ctx = replace(RouterContext.default(1, 40_000), token_ids_T=ids_T)
    routing = router(torch.zeros(40_000, 3), ctx)
    assert not list(router.parameters())
    assert (routing.assignment.counts_E - 10_000).abs().max() < 5 * math.sqrt(40_000 * 0.25 * 0.75)
    again = router(
        torch.ones(4, 3),
        replace(RouterContext.default(2, 2), token_ids_T=torch.tensor([9, 7, 9, 39_999]), step=5),
    )
    mask = chosen(routing, 40_000)
    assert torch.equal(chosen(again, 4), mask[[9, 7, 9, 39_999]])
    other = build_router("hash", d_model=3, num_experts=8, salt=1)(torch.zeros(40_000, 3), ctx)
    assert not torch.equal(other.assignment.token_ids_N, routing.assignment.token_ids_N)
    with pytest.raises(ValueError, match="token_ids_T"):
        router(torch.zeros(4, 3), RouterContext.default(2, 2))


def test_dense_trains_the_whole_mixture_and_evaluates_its_best():
    z_TE = normal(7, 9, 5)
    router = looking_at_logits("dense", 5, eval_top_k=5)
    ctx = RouterContext.default(1, 9)
    training = router(z_TE, ctx)
    assert torch.equal(dense_weights(training, 9), z_TE.softmax(-1))
    assert torch.equal(dense_weights(router.eval()(z_TE, ctx), 9), z_TE.softmax(-1))
    sparse = looking_at_logits("dense", 5, eval_top_k=2).eval()(z_TE, ctx)
    assert sparse.assignment.counts_E.sum() == 18


@pytest.mark.parametrize("zipf", [0.0, 1.0])
def test_random_follows_its_distribution(zipf):
    router = build_router("random", d_model=3, num_experts=5, top_k=1, zipf=zipf)
    routing = router(torch.zeros(20_000, 3), RouterContext.default(2, 10_000))
    wanted_E = 1 / torch.arange(1, 6).double() ** zipf
    found_E = routing.assignment.counts_E / 20_000
    assert (found_E - wanted_E / wanted_E.sum()).abs().max() < 5 * 0.5 / math.sqrt(20_000)


def test_forced_uniform_is_exactly_even():
    router = build_router("random", d_model=3, num_experts=5, top_k=2, draw="uniform")
    assert router(torch.zeros(50, 3), RouterContext.default(2, 25)).assignment.counts_E.tolist() == [20] * 5


@given(SEEDS, st.sampled_from([-1.0, 0.0, 0.05, 0.3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_adaptive_adds_the_second_where_the_first_is_unsure(seed, margin):
    z_TE = normal(seed, 29, 4)
    routing = looking_at_logits("adaptive", 4, margin=margin)(z_TE, RouterContext.default(1, 29))
    best_T2 = z_TE.softmax(-1).topk(2).values
    unsure = int((best_T2[:, 0] - best_T2[:, 1] <= margin).sum())
    assert routing.assignment.counts_E.sum() == 29 + unsure
    assert unsure == {-1.0: 0, 1.0: 29}.get(margin, unsure)


@given(SEEDS, st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_threshold_takes_the_smallest_prefix(seed, threshold):
    z_TE = normal(seed, 19, 6)
    routing = looking_at_logits("threshold", 6, threshold=threshold)(z_TE, RouterContext.default(1, 19))
    for p_E, mask_E in zip(z_TE.softmax(-1).tolist(), chosen(routing, 19).tolist(), strict=True):
        total, wanted = 0.0, set()
        for e in sorted(range(6), key=lambda e, p=p_E: (-p[e], e)):
            if wanted and total >= threshold - 1e-12:
                break
            wanted.add(e)
            total += p_E[e]
        assert {e for e in range(6) if mask_E[e]} == wanted


def test_sigma_drops_each_expert_from_each_token_by_itself():
    """The token takes the best of what is left: three of sixteen, each there with probability 0.6."""
    router = looking_at_logits("sigma", 16, expert_dropout=0.4, top_k=3)
    z_TE, ctx = normal(8, 12 * 40, 16), RouterContext.default(12, 40)
    routing = router(z_TE, ctx)
    routing.check()
    taken_TE = chosen(routing, 480).bool()
    last_T1 = z_TE.where(taken_TE, torch.inf).amin(-1, keepdim=True)
    out_TE = (z_TE > last_T1) & ~taken_TE  # better than one that was taken
    # of the experts down to the third that is taken all but these three are out: 2 of 5 on average
    seen_TE = z_TE >= last_T1
    assert abs(out_TE.sum() / seen_TE.sum() - 0.4) < 0.04
    # a token's neighbour in the sequence has others left out: agreement is that of chance, 0.6^2 + 0.4^2
    both_TE = seen_TE[1:] & seen_TE[:-1]
    agree = (out_TE[1:] == out_TE[:-1])[both_TE].double().mean()
    assert abs(agree - 0.52) < 0.06
    assert_sigmoids(
        routing.assignment.weights_N, z_TE[routing.assignment.token_ids_N, routing.assignment.expert_ids_N()]
    )
    best_TE = torch.zeros_like(taken_TE).scatter(1, z_TE.topk(3).indices, True)
    assert torch.equal(chosen(router.eval()(z_TE, ctx), 480).bool(), best_TE)


@pytest.mark.parametrize("repair", ["none", "next_expert"])
def test_a_random_order_of_drops_is_of_training_alone(repair):
    limits = {"capacity_factor": 0.5, "eval_capacity_factor": 0.5, "min_capacity": 0, "repair": repair}
    lucky = looking_at_logits("topk", 4, drop_order="random", **limits)
    first = looking_at_logits("topk", 4, drop_order="position", **limits)
    z_TE = normal(3, 2 * 31, 4)
    contexts = [replace(RouterContext.default(2, 31), step=step) for step in range(3)]
    drawn = {tuple(lucky(z_TE, ctx).assignment.token_ids_N.tolist()) for ctx in contexts}
    assert len(drawn) == 3
    for ctx in contexts:
        one, other = (r.eval()(z_TE, ctx).assignment for r in (lucky, first))
        assert torch.equal(one.token_ids_N, other.token_ids_N)
        assert torch.equal(one.counts_E, other.counts_E)


def test_sigma_with_every_expert_is_a_dense_network():
    layer = MoELayer(6, 4, 3, router="sigma", router_options={"top_k": 3}, activation="relu").double()
    with torch.no_grad():
        layer.router.weight_ED.zero_()  # sigmoid(0) = 1/2 everywhere
    x_BSD = normal(9, 2, 5, 6)
    y_BSD, _ = layer(x_BSD)
    up, down = layer.experts.w_gate_up_EDCF[:, :, 0], layer.experts.w_down_EFD
    wide = torch.relu(x_BSD @ up.transpose(0, 1).reshape(6, 12)) @ down.reshape(12, 6)
    torch.testing.assert_close(y_BSD, wide / 2, rtol=1e-12, atol=1e-12)


# any number of experts


def test_relu_is_active_where_it_is_positive():
    z_TE = normal(10, 31, 6)
    routing = looking_at_logits("relu", 6)(z_TE, RouterContext.default(1, 31))
    assert torch.equal(dense_weights(routing, 31), z_TE.relu())


def test_blockffn_has_unit_root_mean_square_before_its_scale():
    z_TE = normal(11, 31, 6) + 0.5
    router = looking_at_logits("blockffn", 6, eps=0.0)
    weights_TE = dense_weights(router(z_TE, RouterContext.default(1, 31)), 31)
    some_T = (z_TE > 0).any(-1)
    torch.testing.assert_close(weights_TE[some_T].square().mean(-1), torch.ones(int(some_T.sum())).double())
    assert torch.equal(weights_TE > 0, z_TE > 0)

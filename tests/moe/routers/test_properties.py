"""What each router promises beyond the invariants: its paper's rule, checked against the rule written out."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.moe import MoELayer, RouterContext, Routing, build_router
from moetrain.moe.routers.base import Router
from moetrain.moe.topk_ops import first_max, softmax, top_ids

SEEDS = st.integers(0, 2**20)


def looking_at_logits(name: str, num_experts: int, **options: object) -> Router:
    """A router whose input is its logits."""
    router = build_router(name, d_model=num_experts, num_experts=num_experts, **options).double()
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(num_experts))
    return router


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_weights(routing: Routing, tokens: int) -> Tensor:
    """[T, E], zero where nothing is assigned."""
    weights_TE = torch.zeros(tokens, routing.num_experts, dtype=routing.assignment.weights_N.dtype)
    weights_TE[routing.assignment.token_ids_N, routing.assignment.expert_ids_N()] = (
        routing.assignment.weights_N.detach()
    )
    return weights_TE


def chosen(routing: Routing, tokens: int) -> Tensor:
    mask_TE = torch.zeros(tokens, routing.num_experts, dtype=torch.bool)
    mask_TE[routing.assignment.token_ids_N, routing.assignment.expert_ids_N()] = True
    return mask_TE


def assert_sigmoids(weights_N: Tensor, logits_N: Tensor) -> None:
    """The weights, taken from a matrix of scores, are the logits' sigmoids.

    The last elements of a tensor may be computed by another exponential than those before: it, a sum and a
    quotient err by at most 5 * 2^-53 of the value on either side.
    """
    torch.testing.assert_close(weights_N, logits_N.sigmoid(), rtol=10 * 2**-53, atol=0)


# selection


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


# token choice


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


def test_sigma_drops_whole_experts_of_a_sequence():
    router = looking_at_logits("sigma", 16, expert_dropout=0.4)
    z_TE = normal(8, 12 * 40, 16)
    routing = router(z_TE, RouterContext.default(12, 40))
    routing.check()
    gone = [set(range(16)) - set(row.nonzero().flatten().tolist()) for row in routing.demand_BE]
    assert 0.3 < sum(map(len, gone)) / (12 * 16) < 0.5
    assert len({frozenset(g) for g in gone}) > 6
    assert_sigmoids(
        routing.assignment.weights_N, z_TE[routing.assignment.token_ids_N, routing.assignment.expert_ids_N()]
    )
    assert (router.eval()(z_TE, RouterContext.default(12, 40)).demand_BE > 0).all()


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


# balanced routers


@given(SEEDS, st.sampled_from([1.0, 2.0, 2.5]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_expert_choice_equals_brute_force(seed, share, padded):
    num_experts, batch, seq = 5, 3, 14
    z_TE = normal(seed, batch * seq, num_experts)
    valid_T = normal(seed + 1, batch * seq) > -0.5 if padded else torch.ones(batch * seq, dtype=torch.bool)
    ctx = replace(RouterContext.default(batch, seq), valid_T=valid_T)
    routing = looking_at_logits("expert_choice", num_experts, experts_per_token=share)(z_TE, ctx)
    p_TE, wanted = z_TE.softmax(-1), set()
    for b, e in itertools.product(range(batch), range(num_experts)):
        tokens = [t for t in range(b * seq, (b + 1) * seq) if valid_T[t]]
        c = math.ceil(len(tokens) * share / num_experts)
        wanted |= {(e, t) for t in sorted(tokens, key=lambda t, e=e: (-p_TE[t, e], t))[:c]}
    found = set(
        zip(routing.assignment.expert_ids_N().tolist(), routing.assignment.token_ids_N.tolist(), strict=True)
    )
    assert found == wanted
    counts = [math.ceil(int(v.sum()) * share / num_experts) for v in valid_T.view(batch, seq)]
    assert routing.assignment.counts_E.tolist() == [sum(counts)] * num_experts


@given(SEEDS, st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_capped_expert_choice_is_stable(seed, cap):
    """No token has more than the cap, every expert is full, and no pair would both rather have each other."""
    num_experts, seq = 6, 24
    z_TE = normal(seed, seq, num_experts)
    router = looking_at_logits("expert_choice", num_experts, experts_per_token=1.0, max_experts=cap)
    mask_TE = chosen(router(z_TE, RouterContext.default(1, seq)), seq)
    p_TE = z_TE.softmax(-1)
    assert (mask_TE.sum(1) <= cap).all()
    assert (mask_TE.sum(0) == seq // num_experts).all()
    worst_E = p_TE.where(mask_TE, 2.0).amin(0)
    worst_T = p_TE.where(mask_TE, 2.0).amin(1)
    has_room_T = mask_TE.sum(1) < cap
    wants_T = has_room_T[:, None] | (p_TE > worst_T[:, None])
    assert not (~mask_TE & (p_TE > worst_E) & wants_T).any()


def test_expert_choice_is_not_causal_and_its_threshold_is():
    router = looking_at_logits("expert_choice", 3, experts_per_token=1.0)
    ctx = RouterContext.default(1, 12)
    one = normal(12, 12, 3)
    other = torch.cat([one[:-3], one[-3:] + torch.tensor([9.0, 0.0, 0.0])])
    assert not torch.equal(chosen(router(one, ctx), 12)[:9], chosen(router(other, ctx), 12)[:9])
    router.eval()
    assert router.eval_modes == ("threshold", "group")
    assert torch.equal(chosen(router(one, ctx), 12)[:9], chosen(router(other, ctx), 12)[:9])
    router.eval_mode = "group"
    assert not torch.equal(chosen(router(one, ctx), 12)[:9], chosen(router(other, ctx), 12)[:9])


def test_the_threshold_learns_to_take_as_many_tokens():
    """After training on one distribution it takes about as many tokens of it as the experts did."""
    router = looking_at_logits("expert_choice", 4, experts_per_token=2.0, threshold_decay=0.9)
    for step in range(60):
        routing = router(normal(step, 8 * 64, 4), RouterContext.default(8, 64))
        router.after_step(routing.stats)
    fresh = router.eval()(normal(999, 100 * 64, 4), RouterContext.default(100, 64))
    assert fresh.stats is None
    assert fresh.assignment.counts_E.double().div(6400).tolist() == pytest.approx([0.5] * 4, abs=0.03)


@pytest.mark.parametrize("solver", ["exact", "auction"])
@given(
    seed=SEEDS, lengths=st.lists(st.integers(0, 23), min_size=1, max_size=4), num_experts=st.integers(1, 7)
)
@settings(max_examples=25, deadline=None)
def test_base_gives_every_expert_the_same(solver, seed, lengths, num_experts):
    """Within each sequence, to one token; by scores that -inf and padding do not disturb."""
    batch, seq = len(lengths), 23
    valid_T = (torch.arange(seq) < torch.tensor(lengths)[:, None]).flatten()
    z_TE = normal(seed, batch * seq, num_experts)
    z_TE[::5] = float("-inf")
    router = looking_at_logits("base", num_experts, solver=solver)
    router.logits = lambda x: x
    routing = router(z_TE, replace(RouterContext.default(batch, seq), valid_T=valid_T))
    routing.check()
    for row_E, n in zip(routing.demand_BE, lengths, strict=True):
        assert row_E.sum() == n
        assert row_E.max() - row_E.min() <= 1
    finite = z_TE[routing.assignment.token_ids_N, routing.assignment.expert_ids_N()]
    assert_sigmoids(routing.assignment.weights_N, finite)


def test_base_in_evaluation_is_the_best_expert():
    z_TE = normal(13, 40, 5)
    routing = looking_at_logits("base", 5).eval()(z_TE, RouterContext.default(2, 20))
    best_T = z_TE.argmax(-1)
    assert torch.equal(chosen(routing, 40), torch.nn.functional.one_hot(best_T, 5).bool())


def test_base_groups_by_several_sequences():
    z_TE = torch.zeros(8, 4, dtype=torch.float64)
    z_TE[:4, 0] = z_TE[4:, 1] = 1.0
    one = looking_at_logits("base", 4)(z_TE, RouterContext.default(2, 4))
    assert one.demand_BE.tolist() == [[1] * 4] * 2
    both = looking_at_logits("base", 4, group="2")(z_TE, RouterContext.default(2, 4))
    assert both.demand_BE.tolist() != one.demand_BE.tolist()
    assert both.assignment.counts_E.tolist() == [2] * 4


def test_sinkhorn_balances_what_top_k_does_not():
    z_TE = normal(14, 256, 8) + torch.linspace(0, 3, 8)
    ctx = RouterContext.default(2, 128)
    router = looking_at_logits("sinkhorn", 8, top_k=1)
    balanced, plain = router(z_TE, ctx), looking_at_logits("sinkhorn", 8, top_k=1).eval()(z_TE, ctx)
    assert torch.equal(plain.assignment.counts_E, torch.bincount(z_TE.argmax(-1), minlength=8))
    assert balanced.assignment.counts_E.double().var() < 0.1 * plain.assignment.counts_E.double().var()
    assert_sigmoids(
        balanced.assignment.weights_N,
        z_TE[balanced.assignment.token_ids_N, balanced.assignment.expert_ids_N()],
    )

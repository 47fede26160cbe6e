"""Top-k routing: algebraic properties on random logits, groups and bias, jitter, ties.

Shapes: T tokens, D model, E experts, K top-k, M groups. Routers here have D = E and an identity matrix where
a test wants to choose the logits themselves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.moe import Router, RouterContext, Routing, build_router
from moetrain.moe.routers.topk import _JITTER_SALT

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
sizes = st.tuples(st.integers(0, 17), st.integers(1, 13), st.integers(0, 2**31 - 1))  # T, E, seed


def identity_router(num_experts: int, **options: Any) -> Router:
    """A router whose logits are its input."""
    router = build_router("topk", d_model=num_experts, num_experts=num_experts, **options).double()
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(num_experts))
    return router


def logits(tokens: int, num_experts: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(tokens, num_experts, dtype=torch.float64, generator=generator)


def route(z_TE: Tensor, **options: Any) -> Routing:
    routing = identity_router(z_TE.shape[1], **options)(z_TE, RouterContext.default(1, z_TE.shape[0]))
    routing.check()
    return routing


def dense(routing: Routing) -> Tensor:
    """The weights as a [T, E] matrix, zero where an expert was not chosen."""
    g_TE = torch.zeros_like(routing.scores_TE)
    return g_TE.index_put(
        (routing.assignment.token_ids_N, routing.assignment.expert_ids_N()), routing.assignment.weights_N
    )


def chosen(routing: Routing) -> Tensor:
    hits_TE = torch.zeros_like(routing.scores_TE, dtype=torch.bool)
    hits_TE[routing.assignment.token_ids_N, routing.assignment.expert_ids_N()] = True
    return hits_TE


@quick
@given(sizes, st.data())
def test_softmax_after_equals_renormalised_softmax(size: tuple[int, int, int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, size[1]))
    z_TE = logits(*size)
    before = route(z_TE, top_k=k, score="softmax", renormalize=True)
    after = route(z_TE, top_k=k, score="softmax_after")
    assert torch.equal(before.assignment.token_ids_N, after.assignment.token_ids_N)
    assert torch.equal(before.assignment.counts_E, after.assignment.counts_E)
    torch.testing.assert_close(before.assignment.weights_N, after.assignment.weights_N, rtol=0, atol=1e-12)
    torch.testing.assert_close(dense(after).sum(-1), torch.ones(size[0]).double(), rtol=0, atol=1e-12)


@quick
@given(sizes, st.sampled_from(["softmax", "sigmoid"]), st.data())
def test_weights_are_the_scores_of_the_k_best(
    size: tuple[int, int, int], score: str, data: st.DataObject
) -> None:
    tokens, num_experts, _ = size
    k = data.draw(st.integers(1, num_experts))
    z_TE = logits(*size)
    p_TE = (
        torch.exp(z_TE) / torch.exp(z_TE).sum(-1, keepdim=True)
        if score == "softmax"
        else 1 / (1 + (-z_TE).exp())
    )
    routing = route(z_TE, top_k=k, score=score, renormalize=False, route_scale=1.5)
    g_TE, hits_TE = dense(routing), chosen(routing)
    torch.testing.assert_close(g_TE, torch.where(hits_TE, 1.5 * p_TE, 0.0), rtol=0, atol=1e-12)
    assert (hits_TE.sum(-1) == k).all()
    if k < num_experts:
        assert (
            z_TE.masked_fill(~hits_TE, torch.inf).amin(-1) >= z_TE.masked_fill(hits_TE, -torch.inf).amax(-1)
        ).all()
    if score == "softmax":
        assert (
            (g_TE.sum(-1) < 1.5).all()
            if k < num_experts
            else torch.allclose(g_TE.sum(-1), g_TE.new_tensor(1.5))
        )
    assert routing.demand_E.tolist() == routing.assignment.counts_E.tolist() == hits_TE.sum(0).tolist()
    assert int(routing.assignment.counts_E.sum()) == k * tokens


@quick
@given(sizes, st.sampled_from(["softmax", "softmax_after", "sigmoid"]), st.data())
def test_permuting_the_experts_permutes_the_choice(
    size: tuple[int, int, int], score: str, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, size[1]))
    z_TE = logits(*size)
    places = torch.tensor(data.draw(st.permutations(range(size[1]))))
    g_TE = dense(route(z_TE, top_k=k, score=score))
    torch.testing.assert_close(dense(route(z_TE[:, places], top_k=k, score=score)), g_TE[:, places])


@pytest.mark.parametrize("score", ["softmax", "softmax_after"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_k_equal_to_e_is_the_dense_mixture(score: str, renormalize: bool) -> None:
    z_TE = logits(13, 7, 0)
    routing = route(z_TE, top_k=7, score=score, renormalize=renormalize)
    torch.testing.assert_close(dense(routing), z_TE.softmax(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("score", ["softmax", "softmax_after", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_renormalised_choice_gives_the_router_no_gradient(score: str, dtype: torch.dtype) -> None:
    router = build_router("topk", d_model=5, num_experts=7, top_k=1, score=score).to(dtype)
    routing = router(torch.randn(101, 5, dtype=dtype), RouterContext.default(1, 101))
    assert (routing.assignment.weights_N == 1).all()
    (routing.assignment.weights_N * torch.randn(101, dtype=dtype)).sum().backward()
    assert router.weight_ED.grad is not None  # zero, not missing: data-parallel ranks reduce it
    assert not router.weight_ED.grad.any()
    open_router = build_router("topk", d_model=5, num_experts=7, top_k=1, renormalize=False)
    open_router(torch.randn(101, 5), RouterContext.default(1, 101)).assignment.weights_N.sum().backward()
    assert open_router.weight_ED.grad.abs().sum() > 0


@quick
@given(st.integers(0, 2**31 - 1), st.sampled_from([(12, 4), (6, 3), (8, 2), (5, 5), (6, 1)]), st.data())
def test_group_limited_choice(seed: int, layout: tuple[int, int], data: st.DataObject) -> None:
    num_experts, num_groups = layout
    size = num_experts // num_groups
    top_groups = data.draw(st.integers(1, num_groups))
    k = data.draw(st.integers(1, top_groups * size))
    merit = data.draw(st.sampled_from(["top2", "max"]))
    shift = data.draw(st.sampled_from([0.0, -5.0, 0.25]))
    bias = [round(b * 64) / 64 + shift for b in logits(1, num_experts, seed)[0].tolist()]
    options = {
        "top_k": k,
        "score": "sigmoid",
        "num_groups": num_groups,
        "top_groups": top_groups,
        "group_score": merit,
    }
    router = identity_router(num_experts, **options)
    router.bias_E.copy_(torch.tensor(bias))
    z_TE = logits(11, num_experts, seed + 1)
    routing = router(z_TE, RouterContext.default(1, 11))
    routing.check()
    hits_TE = chosen(routing)
    assert (hits_TE.view(11, num_groups, size).any(-1).sum(-1) <= top_groups).all()
    spec = oracle.Spec(**options)
    for t in range(11):
        values = [float(torch.sigmoid(z)) + b for z, b in zip(z_TE[t], bias, strict=True)]
        assert sorted(oracle.select(values, spec)) == torch.nonzero(hits_TE[t]).view(-1).tolist()
    # weights come from the scores, not from the biased ones
    s_TE = torch.where(hits_TE, torch.sigmoid(z_TE), 0.0)
    want = s_TE / s_TE.sum(-1, keepdim=True) if k > 1 else hits_TE.double()
    torch.testing.assert_close(dense(routing), want, rtol=0, atol=1e-12)


def grouped(bias_E: Tensor, z_TE: Tensor, **options: Any) -> Routing:
    router = identity_router(12, score="sigmoid", top_k=3, **options)
    router.bias_E.copy_(bias_E)
    return router(z_TE, RouterContext.default(1, z_TE.shape[0]))


@pytest.mark.parametrize("shift", [-5.0, 3.0])
def test_one_constant_on_every_bias_changes_nothing(shift: float) -> None:
    """Masked groups must lose even where every real selection score is negative."""
    z_TE, bias_E = logits(41, 12, 0), torch.arange(12) % 5 / 16
    options = {"num_groups": 4, "top_groups": 2}
    plain, moved = grouped(bias_E, z_TE, **options), grouped(bias_E + shift, z_TE, **options)
    assert torch.equal(plain.assignment.token_ids_N, moved.assignment.token_ids_N)
    assert torch.equal(plain.assignment.counts_E, moved.assignment.counts_E)
    assert torch.equal(plain.assignment.weights_N, moved.assignment.weights_N)


def test_the_bias_chooses_but_does_not_weigh_and_has_no_gradient() -> None:
    z_TE = logits(41, 12, 1)
    pushed = grouped(torch.eye(12)[7] * 10, z_TE)
    assert int(pushed.assignment.counts_E[7]) == 41
    assert not torch.equal(pushed.assignment.counts_E, grouped(torch.zeros(12), z_TE).assignment.counts_E)
    s_TE = torch.where(chosen(pushed), torch.sigmoid(z_TE), 0.0)
    torch.testing.assert_close(dense(pushed), s_TE / s_TE.sum(-1, keepdim=True), rtol=0, atol=1e-12)
    router = identity_router(12)
    assert not router.bias_E.requires_grad
    assert [name for name, _ in router.named_parameters()] == ["weight_ED"]


def jittered(ctx: RouterContext, x_TD: Tensor) -> Tensor:
    """The jittered input, bit for bit: the products of an identity matrix are exact in any number of rows."""
    return identity_router(5, jitter=0.2)(x_TD, ctx).logits_TE


def test_jitter_follows_the_sample_through_any_split() -> None:
    x_BSD = logits(24, 5, 0).view(6, 4, 5)
    ids_B = torch.tensor([3, 99, 4, 2**40, 0, 17])
    ctx = replace(RouterContext.default(6, 4), sample_ids_B=ids_B, seed=3, step=8, layer=1)
    whole = jittered(ctx, x_BSD.view(-1, 5)).view(6, 4, 5)
    for rows in ([0], [5, 1], [4, 3, 2]):  # another micro-batch, rank or order
        part = replace(ctx, batch=len(rows), sample_ids_B=ids_B[rows])
        assert torch.equal(jittered(part, x_BSD[rows].view(-1, 5)).view(-1, 4, 5), whole[rows])
    for other in ({"seed": 4}, {"step": 9}, {"layer": 2}, {"sample_ids_B": ids_B + 1}):
        changed = jittered(replace(ctx, **other), x_BSD.view(-1, 5)).view(6, 4, 5)
        assert (changed != whole).flatten(1).any(1).all()


def test_jitter_multiplies_the_input_in_training_only() -> None:
    router = identity_router(7, jitter=0.2)
    ctx, ones_TD = RouterContext.default(3, 50), torch.ones(150, 7, dtype=torch.float64)
    seen_TE = router(ones_TD, ctx).logits_TE
    assert ((seen_TE > 0.8) & (seen_TE < 1.2)).all()
    assert seen_TE.min() < 0.81
    assert seen_TE.max() > 1.19
    want = 1 + 0.2 * (2 * ctx.uniform((150, 7), _JITTER_SALT).double() - 1)
    torch.testing.assert_close(seen_TE, want, rtol=0, atol=1e-12)
    assert torch.equal(router.eval()(ones_TD, ctx).logits_TE, ones_TD)


@pytest.mark.parametrize("score", ["softmax", "softmax_after", "sigmoid"])
@pytest.mark.parametrize("num_experts", [1, 2, 5, 16])
def test_ties_give_a_valid_routing(score: str, num_experts: int) -> None:
    for k in {1, min(2, num_experts), num_experts}:
        routing = route(torch.zeros(13, num_experts, dtype=torch.float64), top_k=k, score=score)
        torch.testing.assert_close(routing.assignment.weights_N, torch.full((13 * k,), 1 / k).double())
        assert int(routing.assignment.counts_E.sum()) == 13 * k
        assert torch.equal(
            routing.assignment.token_ids_N,
            route(torch.zeros(13, num_experts).double(), top_k=k).assignment.token_ids_N,
        )


@pytest.mark.parametrize("score", ["softmax", "softmax_after", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_minus_infinity_logits_are_chosen_last_and_weigh_nothing(score: str, k: int) -> None:
    router = build_router("topk", d_model=1, num_experts=5, score=score, top_k=k).double()
    with torch.no_grad():
        router.weight_ED.copy_(torch.tensor([[0.5], [-torch.inf], [1.5], [-torch.inf], [-1.0]]))
    routing = router(torch.rand(11, 1, dtype=torch.float64) + 0.1, RouterContext.default(1, 11))
    routing.check()
    g_TE = dense(routing)
    assert not g_TE[:, [1, 3]].any()
    assert routing.assignment.counts_E[[1, 3]].sum() == 11 * max(0, k - 3)
    torch.testing.assert_close(g_TE.sum(-1), torch.ones(11).double())


def test_padding_is_routed_nowhere() -> None:
    valid_T = torch.tensor([True, False, True, True, False, False, True, False, True, True])
    z_TE = logits(10, 5, 0)
    ctx = replace(RouterContext.default(2, 5), valid_T=valid_T)
    routing = identity_router(5)(z_TE, ctx)
    routing.check()
    assert routing.num_tokens_B.tolist() == [3, 3]
    assert routing.demand_BE.sum(1).tolist() == [6, 6]
    assert torch.equal(chosen(routing).any(-1), valid_T)
    cut = route(z_TE[valid_T])
    assert torch.equal(chosen(routing)[valid_T], chosen(cut))
    # Another number of rows may take another kernel. A weight is an exponential over a sum of five, over a
    # sum of two of these: at most 22 roundings of 2^-53 on either side.
    torch.testing.assert_close(dense(routing)[valid_T], dense(cut), rtol=0, atol=44 * 2**-53)

"""EvoMoE's gate against loops over tokens and experts, over its temperatures.

Shapes: T tokens, D model, E experts.
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
from moetrain.moe.balance import LossTerm, StepTotals, count_ahead, total_loss
from moetrain.moe.routers.evomoe import _SALT

T, E = 17, 6


def context(step=0, seed=0):
    return replace(RouterContext.default(1, T), step=step, seed=seed)


def gumbel(ctx):
    """[T][E], in floats."""
    return [[-math.log(-math.log(u)) for u in row] for row in ctx.uniform((T, E), _SALT).double().tolist()]


def softmax(z):
    powers = [math.exp(v - max(z)) for v in z]
    return [power / sum(powers) for power in powers]


def by_hand(z_TE, noise_TE, tau, threshold, hard, plain):
    """(weights [T][E], which are taken [T][E])."""
    weights, taken = [], []
    for z_E, noise_E in zip(z_TE, noise_TE, strict=True):
        p = softmax([(z + n) / tau for z, n in zip(z_E, noise_E, strict=True)])
        takes = [v == max(p) for v in p] if hard else [v > threshold for v in p]
        w = softmax(z_E) if plain else p
        weights.append([v * t for v, t in zip(w, takes, strict=True)])
        taken.append(takes)
    return weights, taken


@given(
    SEEDS,
    st.sampled_from([(0, 3.0), (10, math.sqrt(3.0 * 0.2)), (20, 0.2), (99, 0.2)]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_training(seed, at, hard, plain):
    step, tau = at
    z_TE, ctx = normal(seed, T, E), context(step, seed)
    options = {"tau_start": 3.0, "tau_end": 0.2, "tau_steps": 20, "threshold": 0.01}
    router = looking_at_logits(
        "evomoe", E, **options, hard_step=step if hard else step + 1, gumbel_weights=not plain
    )
    assert router.tau(step) == pytest.approx(tau, rel=1e-12)
    routing = router(z_TE, ctx)
    weights, taken = by_hand(z_TE.tolist(), gumbel(ctx), tau, 0.01, hard, plain)
    torch.testing.assert_close(
        dense_weights(routing, T), torch.tensor(weights).double(), rtol=1e-6, atol=1e-9
    )
    assert chosen(routing, T).tolist() == taken
    assert routing.scores_TE.equal(dense_weights(routing, T))


@pytest.mark.parametrize("plain", [False, True])
def test_evaluation_is_the_best_without_noise(plain):
    z_TE = normal(1, T, E)
    router = looking_at_logits("evomoe", E, tau_end=0.5, gumbel_weights=not plain).eval()
    weights, _ = by_hand(z_TE.tolist(), [[0.0] * E] * T, 0.5, 0.0, True, plain)
    for step in (0, 5000):
        found = dense_weights(router(z_TE, context(step)), T)
        torch.testing.assert_close(found, torch.tensor(weights).double(), rtol=1e-6, atol=1e-9)


def test_the_linear_schedule_and_none():
    router = build_router(
        "evomoe", d_model=3, num_experts=E, tau_start=2.0, tau_end=1.0, tau_steps=4, decay="linear"
    )
    assert [router.tau(step) for step in (0, 1, 3, 4, 9)] == [2.0, 1.75, 1.25, 1.0, 1.0]
    assert build_router("evomoe", d_model=3, num_experts=E, tau_steps=0).tau(0) == 0.3


@pytest.mark.parametrize("gumbel_weights", [True, False])
def test_gradients(gumbel_weights):
    z_TE, ctx, cotangent_TE = normal(2, T, E), context(3), normal(3, T, E)
    router = looking_at_logits("evomoe", E, threshold=0.05, gumbel_weights=gumbel_weights)
    routing = router(z_TE, ctx)
    a = routing.assignment
    (ours,) = torch.autograd.grad(
        (a.weights_N * cotangent_TE[a.token_ids_N, a.expert_ids_N()]).sum(), router.weight_ED
    )
    leaf = router.weight_ED.detach().clone().requires_grad_()
    exponent_TE = z_TE @ leaf.T
    if gumbel_weights:
        exponent_TE = (exponent_TE + torch.tensor(gumbel(ctx)).double()) / router.tau(3)
    p_TE = torch.exp(exponent_TE)
    p_TE = p_TE / p_TE.sum(1, keepdim=True)
    mask_TE = chosen(routing, T)
    assert 0 < int(mask_TE.sum()) < T * E
    (theirs,) = torch.autograd.grad((p_TE * cotangent_TE)[mask_TE].sum(), leaf)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_from_all_experts_to_one():
    """The same noise throughout: an expert that is left out never comes back, and the best stays."""
    z_TE, ctx, before = normal(4, T, E) * 3, context(), None
    for tau in (1e4, 10.0, 3.0, 1.0, 0.3, 0.1, 0.01, 1e-3):
        router = looking_at_logits("evomoe", E, tau_start=tau, tau_end=tau)
        taken_TE = chosen(router(z_TE, ctx), T)
        if before is None:
            assert taken_TE.all()
        else:
            assert not (taken_TE & ~before).any()
        before = taken_TE
    assert before.sum(1).tolist() == [1] * T
    noisy = z_TE + torch.tensor(gumbel(ctx)).double()
    assert before.long().argmax(1).equal(noisy.argmax(1))


def test_its_loss_is_the_released_codes():
    z_TE, ctx = normal(5, T, E), context(7)
    routing = looking_at_logits("evomoe", E, threshold=0.1)(z_TE, ctx)
    weights_TE, taken_TE = dense_weights(routing, T), chosen(routing, T).double()
    term = LossTerm("l1", 1.0, "global_batch")
    value, _ = total_loss({0: routing}, [term], StepTotals(float(T), count_ahead([{0: routing}], [term])))
    wanted = sum(float(weights_TE[:, e].mean() * taken_TE[:, e].mean()) for e in range(E)) * E
    assert float(value.detach()) == pytest.approx(wanted, rel=1e-12)


def test_a_threshold_leaves_every_token_an_expert():
    with pytest.raises(
        ValueError, match=r"router.threshold=0.2 must be below 1 / num_experts=0.2, or a token"
    ):
        build_router("evomoe", d_model=3, num_experts=5, threshold=0.2)

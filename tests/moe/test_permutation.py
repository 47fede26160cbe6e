"""The search for an order of experts: against scipy's assignment, divisions of exponentials, and products.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import SEEDS, dense_weights, normal
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

from moetrain.moe import ROUTERS, MoELayer, RouterContext, build_router
from moetrain.moe.permutation import Permutation, best_permutation, soft_permutation

D, E, T, STEPS = 5, 6, 13, 100
PERMUTABLE = sorted(name for name, spec in ROUTERS.items() if spec.cls.permutable)


def router_of(name, order_EE, **options):
    torch.manual_seed(3)
    router = build_router(name, d_model=D, num_experts=E, permutation_steps=STEPS, **options).double()
    with torch.no_grad():
        router.order_EE.copy_(order_EE)
    return router


def plain_of(router, name, **options):
    """The same router without a search."""
    plain = build_router(name, d_model=D, num_experts=E, **options).double().train(router.training)
    plain.load_state_dict({k: v for k, v in router.state_dict().items() if k != "order_EE"})
    return plain


def context(step=0):
    return replace(RouterContext.default(1, T), step=step, token_ids_T=torch.arange(T))


def by_division(order_EE, temperature, iterations):
    """Sinkhorn's iterations on the exponentials themselves."""
    p_EE = torch.exp(order_EE / temperature)
    for _ in range(iterations):
        p_EE = p_EE / p_EE.sum(1, keepdim=True)
        p_EE = p_EE / p_EE.sum(0, keepdim=True)
    return p_EE


@given(SEEDS, st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_the_permutation_is_scipys(seed, num_experts):
    p_EE = normal(seed, num_experts, num_experts)
    found = best_permutation(p_EE, torch.zeros_like(p_EE))
    assert found.tolist() == linear_sum_assignment(p_EE.numpy(), maximize=True)[1].tolist()
    order_EE = normal(seed + 1, num_experts, num_experts)  # of the ties alone
    found = best_permutation(torch.ones_like(p_EE), order_EE)
    assert found.tolist() == linear_sum_assignment(order_EE.numpy(), maximize=True)[1].tolist()


@pytest.mark.parametrize(
    ("step", "temperature", "iterations"), [(0, 1e-3, 20), (50, 1e-5, 85), (100, 1e-7, 150), (999, 1e-7, 150)]
)
def test_the_schedule(step, temperature, iterations):
    order_EE = normal(1, E, E) * temperature  # so that exponentials fit
    torch.testing.assert_close(
        soft_permutation(order_EE, step, STEPS), by_division(order_EE, temperature, iterations)
    )


def of_scipy(order_EE):
    """The expert of each output after the search: scipy's assignment in the last P, ties by the weights."""
    last_EE = by_logarithms(order_EE.numpy(), 1e-7, 150) + 1e-6 * (order_EE / order_EE.abs().max()).numpy()
    return torch.from_numpy(linear_sum_assignment(last_EE, maximize=True)[1])


def by_logarithms(order_EE, temperature, iterations):
    log_EE = order_EE / temperature
    for _ in range(iterations):
        for axis in (1, 0):
            log_EE = log_EE - logsumexp(log_EE, axis=axis, keepdims=True)
    return np.exp(log_EE)


def test_the_permutation_is_solved_again_where_it_changed():
    solver = Permutation(STEPS)
    for seed in (2, 3, 3):
        order_EE = normal(seed, E, E)
        assert solver.of(order_EE).equal(of_scipy(order_EE))


@pytest.mark.parametrize("name", PERMUTABLE)
def test_after_the_search_experts_are_only_renamed(name):
    order_EE, x_TD = normal(4, E, E), normal(5, T, D)
    expert_E = of_scipy(order_EE)
    for training, step in ((True, STEPS), (True, STEPS + 7), (False, 0)):
        router = router_of(name, order_EE).train(training)
        found, before = router(x_TD, context(step)), plain_of(router, name)(x_TD, context(step))
        found.check()
        moved_TE = torch.zeros(T, E, dtype=torch.float64)
        moved_TE[:, expert_E] = dense_weights(before, T)
        assert dense_weights(found, T).equal(moved_TE)
        assert found.demand_E[expert_E].equal(before.demand_E)
        for field in ("scores_TE", "logits_TE", "load_TE"):
            values, old = getattr(found, field), getattr(before, field)
            assert (values is None) is (old is None)
            assert values is None or values[:, expert_E].equal(old)
        for reached in (found.penalty, found.assignment.weights_N.sum()):
            (grad,) = torch.autograd.grad(reached, router.order_EE, retain_graph=True)
            assert not grad.any()  # zeros, not None: the search is over on every layout alike


@pytest.mark.parametrize("name", ["topk", "sigmoid", "comet", "relu"])
def test_the_search_mixes_the_routers_weights(name):
    """Weights and their gradients are those of G P, each token scaled to its sum before."""
    order_EE, x_TD = normal(6, E, E) * 1e-3, normal(7, T, D)
    router = router_of(name, order_EE)
    plain = plain_of(router, name)
    found, before = router(x_TD, context(0)), plain(x_TD, context(0))
    found.check()
    a = before.assignment
    given_TE = torch.zeros(T, E, dtype=torch.float64).index_put(
        (a.token_ids_N, a.expert_ids_N()), a.weights_N
    )
    leaf_EE = order_EE.clone().requires_grad_()
    p_EE = by_division(leaf_EE, 1e-3, 20)
    assert float(p_EE.detach().min()) > 1e-5
    mixed_TE = given_TE @ p_EE
    mixed_TE = mixed_TE * (given_TE.sum(1) / mixed_TE.sum(1).where(given_TE.sum(1) > 0, 1))[:, None]
    torch.testing.assert_close(dense_weights(found, T), mixed_TE.detach())
    torch.testing.assert_close(dense_weights(found, T).sum(1), given_TE.detach().sum(1))
    assert torch.equal(
        found.demand_E, (given_TE.sum(1) > 0).sum().expand(E)
    )  # every expert of a served token
    rows_EE = p_EE / p_EE.sum(1, keepdim=True)
    entropy = -sum((q * torch.log(q + 1e-6)).sum() for q in (p_EE, rows_EE))
    own = 0.0 if before.penalty is None else before.penalty
    cotangent_TE = normal(8, T, E)
    b = found.assignment
    ours = (b.weights_N * cotangent_TE[b.token_ids_N, b.expert_ids_N()]).sum() + found.penalty
    theirs = (mixed_TE * cotangent_TE).sum() + 1e-4 * entropy + own
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    leaves = dict(router.named_parameters())
    grads = dict(zip(leaves, torch.autograd.grad(ours, list(leaves.values())), strict=True))
    others = dict(plain.named_parameters()) | {"order_EE": leaf_EE}
    wanted = dict(zip(others, torch.autograd.grad(theirs, list(others.values())), strict=True))
    for key, grad in grads.items():
        torch.testing.assert_close(grad, wanted[key], rtol=1e-8, atol=1e-10)


def test_small_entries_are_left_out():
    order_EE = torch.eye(E).double() * 0.02  # e^-20 of a neighbour's share
    routing = router_of("topk", order_EE)(normal(9, T, D), context(0))
    assert torch.bincount(routing.assignment.token_ids_N).tolist() == [2] * T
    assert float(soft_permutation(order_EE, 0, STEPS).diagonal().min()) < 1
    total_T = dense_weights(routing, T).sum(1)
    torch.testing.assert_close(total_T, torch.ones(T).double(), rtol=1e-14, atol=0)


def test_a_layer_computes_what_moved_experts_compute():
    order_EE, x_BSD = normal(10, E, E), normal(11, 2, 7, D)
    expert_E = of_scipy(order_EE)
    torch.manual_seed(0)
    searched = MoELayer(D, 3, E, router_options={"permutation_steps": 5}).double().eval()
    plain = MoELayer(D, 3, E).double().eval()
    with torch.no_grad():
        searched.router.order_EE.copy_(order_EE)
        plain.router.weight_ED.copy_(searched.router.weight_ED)
        for name, p in plain.experts.named_parameters():
            p.copy_(searched.experts.get_parameter(name)[expert_E])
    torch.testing.assert_close(searched(x_BSD)[0], plain(x_BSD)[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - set(PERMUTABLE)))
def test_what_cannot_change_places_is_refused(name):
    with pytest.raises(
        ValueError, match=rf"router={name} cannot take: .* set router\.permutation_steps=null"
    ):
        build_router(name, d_model=D, num_experts=E, permutation_steps=3)


def test_a_selection_bias_is_of_outputs_and_not_of_experts():
    router = build_router("topk", d_model=D, num_experts=E, permutation_steps=3)
    assert (router.reads_bias, router.has_penalty) == (False, True)
    assert (router.takes_best, router.replays) == (False, False)
    assert build_router("topk", d_model=D, num_experts=E).reads_bias

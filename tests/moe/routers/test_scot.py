"""Sparsity-constrained transport against scipy: its L-BFGS on the dual in both potentials, a bound for all.

Shapes: G groups, L tokens of a group, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from router_cases import SEEDS, chosen, looking_at_logits, normal
from scipy.optimize import linear_sum_assignment, minimize

from moetrain.moe import RouterContext
from moetrain.moe.solvers import sparse_plan
from moetrain.moe.solvers.lbfgs import minimize as minimize_many


def dual(scores_LE, most, gamma):
    """(the dual's least value, the plan there) by scipy, over potentials of tokens and of experts.

    For any potentials the dual, ``sum_j (the largest relu(u_j)^2) / (2 gamma) - sum alpha - L / E sum beta``,
    is at least ``sum P z - gamma / 2 sum P^2`` of every plan that the bound on tokens allows.
    """
    length, num_experts = scores_LE.shape

    def plan(alpha, beta):
        u_LE = scores_LE + alpha[:, None] + beta[None]
        part_LE = np.maximum(u_LE, 0) / gamma
        for j in range(num_experts):
            part_LE[np.argsort(-u_LE[:, j], kind="stable")[most:], j] = 0
        return part_LE

    def value(potentials):
        alpha, beta = potentials[:length], potentials[length:]
        part_LE = plan(alpha, beta)
        total = gamma / 2 * (part_LE**2).sum() - alpha.sum() - length / num_experts * beta.sum()
        return total, np.concatenate([part_LE.sum(1) - 1, part_LE.sum(0) - length / num_experts])

    found = minimize(
        value, np.zeros(length + num_experts), jac=True, method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 20000, "ftol": 1e-16, "gtol": 1e-10},
    )  # fmt: skip
    return found.fun, plan(found.x[:length], found.x[length:])


def solved(scores_GLE, most, gamma, iterations=400, valid_GL=None):
    groups, length, _ = scores_GLE.shape
    valid_GL = torch.ones(groups, length, dtype=torch.bool) if valid_GL is None else valid_GL
    most_G = torch.full((groups,), most)
    return sparse_plan(scores_GLE, valid_GL, most_G, most, gamma, iterations, 1e-9)


@pytest.mark.parametrize(
    ("length", "num_experts", "most", "gamma"),
    [(24, 4, 12, 0.1), (24, 4, 24, 1.0), (29, 3, 29, 3.0), (30, 5, 8, 0.2), (17, 7, 6, 0.3)],
)
def test_the_plan_is_scipys(length, num_experts, most, gamma):
    z_LE = normal(length, length, num_experts)
    plan_LE = solved(z_LE[None], most, gamma)[0]
    bound, theirs = dual(z_LE.numpy(), most, gamma)
    torch.testing.assert_close(plan_LE, torch.from_numpy(theirs), rtol=0, atol=1e-4)
    assert float((plan_LE.sum(1) - 1).abs().max()) < 1e-6
    torch.testing.assert_close(plan_LE.sum(0), torch.full((num_experts,), length / num_experts).double())
    assert int((plan_LE > 0).sum(0).max()) <= most
    # no plan is better: the dual's value is a bound for each, and ours reaches it
    value = float((plan_LE * z_LE).sum() - gamma / 2 * plan_LE.square().sum())
    assert value == pytest.approx(bound, abs=1e-6)


def test_the_bound_on_tokens_binds():
    """Where the plan without a bound gives an expert more tokens: fewer, and a smaller value."""
    z_LE = normal(3, 24, 4)
    free, bound = (solved(z_LE[None], most, 0.5)[0] for most in (24, 11))
    assert int((free > 0).sum(0).max()) > 11
    assert int((bound > 0).sum(0).max()) == 11
    upper, _ = dual(z_LE.numpy(), 11, 0.5)
    value = [float((p * z_LE).sum() - 0.25 * p.square().sum()) for p in (free, bound)]
    assert value[1] < value[0]
    assert upper < value[0] + 1e-9


@given(SEEDS, st.integers(1, 20), st.integers(1, 5), st.integers(1, 5))
@example(149, 4, 3, 1)  # next to no curvature
@settings(max_examples=25, deadline=None)
def test_experts_have_one_mass_and_few_tokens_always(seed, length, num_experts, share):
    z_GLE = normal(seed, 2, length, num_experts) * 3
    most = max(1, min(length, -(-length * share // num_experts)))
    plan_GLE = solved(z_GLE, most, 0.3, iterations=15)
    torch.testing.assert_close(
        plan_GLE.sum(1),
        torch.full((2, num_experts), length / num_experts, dtype=torch.float64),
        rtol=1e-9,
        atol=1e-9,
    )
    assert int((plan_GLE > 0).sum(1).max()) <= most
    assert float(plan_GLE.min()) >= 0


def test_little_regularisation_is_the_assignment_of_most_score():
    """With as many tokens as experts, by scipy's assignment."""
    z_LE = normal(5, 7, 7)
    plan_LE = solved(z_LE[None], 7, 0.02, iterations=2000)[0]
    wanted = torch.zeros(7, 7, dtype=torch.float64)
    wanted[linear_sum_assignment(z_LE.numpy(), maximize=True)] = 1
    torch.testing.assert_close(plan_LE, wanted, rtol=0, atol=1e-6)


def test_padding_and_other_groups_have_no_say():
    z_GLE = normal(6, 3, 12, 4)
    valid_GL = torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) < 0.7
    whole = solved(z_GLE, 4, 0.3, 80, valid_GL)
    other_GLE = z_GLE.where(valid_GL[..., None], 90.0)
    assert solved(other_GLE, 4, 0.3, 80, valid_GL).equal(whole)
    for g in range(3):
        alone = solved(z_GLE[g : g + 1], 4, 0.3, 80, valid_GL[g : g + 1])
        assert alone[0].equal(whole[g])
        short = solved(z_GLE[g : g + 1, valid_GL[g]], 4, 0.3, 80)
        torch.testing.assert_close(short[0], whole[g, valid_GL[g]], rtol=1e-6, atol=1e-8)
    assert not whole[~valid_GL].any()


def test_groups_of_any_length_are_solved_together():
    """Each expert of a group takes as many tokens as the group's own number says, where that binds."""
    z_GLE, length_G = normal(11, 12, 11, 8), torch.arange(12) % 11 + 1
    valid_GL, most_G = torch.arange(11) < length_G[:, None], -(-length_G * 2 // 8)
    whole = sparse_plan(z_GLE, valid_GL, most_G, 3, 0.5, 60, 1e-3)
    assert ((whole > 0).sum(1).amax(1) <= most_G).all()
    for g in range(12):
        one = slice(g, g + 1)
        alone = sparse_plan(z_GLE[one], valid_GL[one], most_G[one], 3, 0.5, 60, 1e-3)[0]
        assert (alone > 0).equal(whole[g] > 0)
        torch.testing.assert_close(alone, whole[g], rtol=0, atol=1e-12)


def test_minimization_reaches_scipys_minimum():
    """Of a quadratic and of Rosenbrock's valley in one go."""

    def rosenbrock(x_GN):
        a, b = x_GN.unbind(-1)
        value = (1 - a) ** 2 + 100 * (b - a * a) ** 2
        slope = torch.stack([-2 * (1 - a) - 400 * a * (b - a * a), 200 * (b - a * a)], -1)
        bowl = torch.tensor([[3.0, 0.5], [1.0, 40.0]], dtype=torch.float64)
        quadratic = (bowl[1] * (x_GN - bowl[0]).square()).sum(-1) / 2
        second = torch.tensor([False, True])
        return torch.where(second, quadratic, value), torch.where(
            second[:, None], bowl[1] * (x_GN - bowl[0]), slope
        )

    start_GN, longest_G = torch.tensor([[-1.2, 1.0], [0.0, 0.0]]).double(), torch.tensor([1.0, 9.0]).double()
    found = minimize_many(rosenbrock, start_GN, longest_G, 300, 1e-10)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0], [3.0, 0.5]]).double(), rtol=1e-8, atol=1e-8)


def test_the_router_takes_what_the_plan_gives():
    z_TE = normal(7, 2 * 24, 4)
    router = looking_at_logits("scot", 4, top_k=2, gamma=0.1, tolerance=1e-9, iterations=400)
    routing = router(z_TE, RouterContext.default(2, 24))
    mask_TE = chosen(routing, 48)
    for g in range(2):
        rows = slice(24 * g, 24 * g + 24)
        _, theirs = dual(z_TE[rows].numpy(), 12, 0.1)
        assert mask_TE[rows].equal(torch.from_numpy(theirs > 1e-4))
    assert mask_TE.any(1).all()
    assert int(mask_TE.view(2, 24, 4).sum(1).max()) <= 12
    p_TE = z_TE.softmax(-1)
    a = routing.assignment
    torch.testing.assert_close(a.weights_N, p_TE[a.token_ids_N, a.expert_ids_N()], rtol=1e-12, atol=0)
    whole = looking_at_logits("scot", 4, top_k=2, gamma=0.1, group="all")
    assert int(whole(z_TE, RouterContext.default(2, 24)).assignment.counts_E.max()) <= 24


def test_the_last_bits_of_scores_have_no_say():
    """As another layout's products may differ: a search at a kink would make other tokens of them."""
    z_TE, ctx = 2 * normal(12, 200 * 11, 8), RouterContext.default(200, 11)
    router = looking_at_logits("scot", 8)
    first = router(z_TE, ctx).assignment
    other = router(z_TE + 1e-13 * normal(13, 200 * 11, 8), ctx).assignment
    assert other.token_ids_N.equal(first.token_ids_N)
    assert other.counts_E.equal(first.counts_E)


def test_gradients_are_those_of_the_softmax_alone():
    z_TE, cotangent_TE = normal(8, 15, 4), normal(9, 15, 4)
    router = looking_at_logits("scot", 4)
    a = router(z_TE, RouterContext.default(1, 15)).assignment
    (ours,) = torch.autograd.grad(
        (a.weights_N * cotangent_TE[a.token_ids_N, a.expert_ids_N()]).sum(), router.weight_ED
    )
    leaf = router.weight_ED.detach().clone().requires_grad_()
    power_TE = torch.exp(z_TE @ leaf.T)
    p_TE = power_TE / power_TE.sum(1, keepdim=True)
    mask_TE = torch.zeros(15, 4, dtype=torch.bool)
    mask_TE[a.token_ids_N, a.expert_ids_N()] = True
    (theirs,) = torch.autograd.grad((p_TE * cotangent_TE)[mask_TE].sum(), leaf)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_evaluation_takes_the_best_without_a_look_at_others():
    z_TE = normal(10, 24, 5)
    router = looking_at_logits("scot", 5, top_k=2).eval()
    routing = router(z_TE, RouterContext.default(1, 24))
    best_TE = torch.zeros(24, 5, dtype=torch.bool).scatter(1, z_TE.topk(2).indices, True)
    assert chosen(routing, 24).equal(best_TE)
    padded = replace(RouterContext.default(1, 24), valid_T=torch.arange(24) < 5)
    assert chosen(router(z_TE, padded), 24)[:5].equal(best_TE[:5])

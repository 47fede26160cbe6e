"""COMET's trees against walks from the root, one token, tree and leaf at a time.

Shapes: T tokens, D model, E experts, K trees.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import SEEDS, dense_weights, normal, step_by_hand

from moetrain.moe import RouterContext, build_router
from moetrain.moe.smooth_choice import smooth_step

D, T = 5, 11


def router_of(num_experts, trees, scale=1.0, seed=0, **options):
    """With nodes of about ``scale`` steps' widths: below 1/2 mostly between, far above mostly decided."""
    router = build_router("comet", d_model=D, num_experts=num_experts, top_k=trees, **options).double()
    gamma = router.options.gamma
    with torch.no_grad():
        for i, (name, p) in enumerate(router.named_parameters()):
            p.copy_(normal(seed + i, *p.shape) * (scale * gamma if name.startswith("node") else 1.0))
    return router


def path(leaf, x_D, parameters, tree, num_experts, gamma):
    """The probability of the way from the root to ``leaf``, walked back up by the parent (n - 1) // 2."""
    p = torch.ones((), dtype=torch.float64)
    while leaf:
        parent = (leaf - 1) // 2
        row = tree * (num_experts - 1) + parent
        s = step_by_hand(
            (parameters["node_weight_ND"][row] * x_D).sum() + parameters["node_bias_N"][row], gamma
        )
        p = p * (s if leaf % 2 else 1 - s)
        leaf = parent
    return p


def by_hand(x_TD, parameters, num_experts, trees, gamma):
    """(weights [T, E], paths [T, K, E])."""
    weights, paths = [], []
    for x_D in x_TD:
        terms, walked = [], []
        for k in range(trees):
            walked.append(
                [
                    path(num_experts - 1 + e, x_D, parameters, k, num_experts, gamma)
                    for e in range(num_experts)
                ]
            )
            for e in range(num_experts):
                row = k * num_experts + e
                a = (parameters["leaf_weight_LD"][row] * x_D).sum() + parameters["leaf_bias_L"][row]
                terms.append(walked[k][e] * torch.exp(a))
        total = sum(terms)
        weights.append(
            torch.stack(
                [sum(terms[k * num_experts + e] for k in range(trees)) / total for e in range(num_experts)]
            )
        )
        paths.append(torch.stack([torch.stack(row) for row in walked]))
    return torch.stack(weights), torch.stack(paths)


@pytest.mark.parametrize(
    ("num_experts", "trees", "scale"), [(8, 2, 0.2), (5, 3, 0.2), (6, 1, 1.0), (2, 2, 0.5)]
)
@pytest.mark.parametrize("training", [True, False])
def test_weights_penalty_and_gradients(num_experts, trees, scale, training):
    router = router_of(num_experts, trees, scale, gamma=0.7, entropy_coef=0.3).train(training)
    x_TD, ctx = normal(90, T, D).requires_grad_(), RouterContext.default(1, T)
    parameters = dict(router.named_parameters())
    leaves = [x_TD, *parameters.values()]
    assert len(leaves) == 5
    routing = router(x_TD, ctx)
    given_TE, paths_TKE = by_hand(x_TD, parameters, num_experts, trees, 0.7)
    torch.testing.assert_close(dense_weights(routing, T), given_TE.detach(), rtol=1e-12, atol=1e-15)
    assert torch.equal(
        dense_weights(routing, T) > 0, paths_TKE.sum(1) > 0
    )  # what no path reaches is left out
    wanted = 0.3 * sum(-p * torch.log(p + 1e-6) for p in paths_TKE.flatten()) / T
    torch.testing.assert_close(routing.penalty, wanted, rtol=1e-12, atol=0)
    cotangent_TE = normal(91, T, num_experts)
    a = routing.assignment
    ours = (a.weights_N * cotangent_TE[a.token_ids_N, a.expert_ids_N()]).sum() + routing.penalty
    theirs = (given_TE * cotangent_TE).sum() + wanted
    for mine, other in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@given(SEEDS, st.integers(1, 13), st.integers(1, 3), st.sampled_from([0.1, 0.5, 3.0]))
@settings(max_examples=25, deadline=None)
def test_paths_of_a_tree_and_weights_sum_to_one(seed, num_experts, trees, scale):
    router = router_of(num_experts, min(trees, num_experts), scale, seed)
    x_TD = normal(seed + 9, T, D)
    like = torch.zeros(T, router.trees, num_experts, dtype=torch.float64)
    paths_TKE = router.paths(x_TD, like)
    torch.testing.assert_close(paths_TKE.sum(-1), torch.ones(T, router.trees).double(), rtol=1e-12, atol=0)
    total_T = router(x_TD, RouterContext.default(1, T)).scores_TE.sum(-1)
    torch.testing.assert_close(total_T, torch.ones(T).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_experts", [7, 8])
def test_a_narrow_step_takes_one_leaf_of_each_tree(num_experts):
    router = router_of(num_experts, 3, scale=1e6)
    x_TD = normal(4, 200, D)
    routing = router(x_TD, RouterContext.default(1, 200))
    assert int(torch.bincount(routing.assignment.token_ids_N, minlength=200).max()) == 3
    assert float(routing.penalty.detach().abs()) < 1e-5


def test_it_begins_dense():
    router = build_router("comet", d_model=64, num_experts=7).double()
    assert router(normal(5, T, 64), RouterContext.default(1, T)).assignment.counts_E.tolist() == [T] * 7


def test_the_step_is_smooth_at_its_ends():
    """Value and slope go to 0 and 1, 0, from inside and are these to the bit outside."""
    for gamma in (0.3, 1.0, 10.0):
        t = torch.tensor([-gamma, -gamma / 2, 0.0, gamma / 2, gamma], dtype=torch.float64, requires_grad=True)
        assert smooth_step(t, gamma).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
        near = torch.tensor([-gamma / 2 * (1 - 1e-6), gamma / 2 * (1 - 1e-6)], dtype=torch.float64)
        (slope,) = torch.autograd.grad(smooth_step(t, gamma).sum(), t)
        assert slope[[0, 4]].tolist() == [0.0, 0.0]
        assert float(slope[2]) == pytest.approx(1.5 / gamma)
        near.requires_grad_()
        (slope,) = torch.autograd.grad(smooth_step(near, gamma).sum(), near)
        assert float(slope.abs().max()) < 1e-5 / gamma
        assert math.isclose(float(smooth_step(near, gamma)[1].detach()), 1.0, abs_tol=1e-11)


def test_scores_of_any_size_stay_finite():
    """The softmax is over paths and scores together, whichever of the two rules a leaf out."""
    for scale in (1.0, 1e4):
        router = router_of(6, 2, 0.3).float()
        x_TD = (normal(3, T, D) * scale).float()
        routing = router(x_TD, RouterContext.default(1, T))
        (routing.assignment.weights_N.square().sum() + routing.penalty).backward()
        assert routing.assignment.weights_N.isfinite().all()
        for p in router.parameters():
            assert p.grad.isfinite().all()

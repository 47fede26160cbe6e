"""The gate with an activation and a temperature against loops, and against top-k without them.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from router_cases import chosen, dense_weights, looking_at_logits, normal

from moetrain.moe import RouterContext, build_router

T, E = 17, 6
BY_HAND = {
    "identity": lambda z: z,
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "tanh": math.tanh,
    "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
}


def at(step):
    return replace(RouterContext.default(1, T), step=step)


def weights_by_hand(z_TE, activation, tau, top_k, renormalize):
    rows = []
    for z_E in z_TE:
        powers = [math.exp(BY_HAND[activation](z) / tau) for z in z_E]
        p_E = [power / sum(powers) for power in powers]
        taken = sorted(range(len(p_E)), key=lambda e, p=p_E: (-p[e], e))[:top_k]
        total = sum(p_E[e] for e in taken) if renormalize else 1.0
        rows.append([p_E[e] / total if e in taken else 0.0 for e in range(len(p_E))])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("activation", sorted(BY_HAND))
@pytest.mark.parametrize("renormalize", [True, False])
def test_training_and_evaluation(activation, renormalize):
    z_TE = normal(1, T, E)
    options = {"tau_start": 4.0, "tau_end": 0.25, "tau_steps": 8}
    router = looking_at_logits("temperature", E, activation=activation, renormalize=renormalize, **options)
    for step, tau in ((0, 4.0), (4, 1.0), (8, 0.25), (70, 0.25)):
        routing = router.train()(z_TE, at(step))
        wanted_TE = weights_by_hand(z_TE.tolist(), activation, tau, 2, renormalize)
        torch.testing.assert_close(dense_weights(routing, T), wanted_TE, rtol=1e-12, atol=1e-15)
        assert routing.logits_TE.equal(z_TE)
        evaluated = router.eval()(z_TE, at(step))
        wanted_TE = weights_by_hand(z_TE.tolist(), activation, 0.25, 2, renormalize)
        torch.testing.assert_close(dense_weights(evaluated, T), wanted_TE, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("training", [True, False])
def test_without_activation_and_temperature_it_is_topk(training):
    x_TD, cotangent_N = normal(2, T, 5), normal(3, 3 * T)
    plain = {"activation": "identity", "tau_start": 1.0, "tau_end": 1.0}
    found = []
    for name, options in (("temperature", plain), ("topk", {})):
        router = build_router(name, d_model=5, num_experts=E, top_k=3, **options).double().train(training)
        with torch.no_grad():
            router.weight_ED.copy_(normal(4, E, 5))
        routing = router(x_TD, at(3))
        (grad,) = torch.autograd.grad((routing.assignment.weights_N * cotangent_N).sum(), router.weight_ED)
        found.append(
            (chosen(routing, T), dense_weights(routing, T), routing.scores_TE, routing.logits_TE, grad)
        )
    for mine, other in zip(*found, strict=True):
        assert mine.equal(other)


@pytest.mark.parametrize("activation", sorted(BY_HAND))
def test_gradients(activation):
    z_TE, cotangent_TE = normal(5, T, E), normal(6, T, E)
    router = looking_at_logits("temperature", E, activation=activation, renormalize=False, tau_start=0.7)
    routing = router(z_TE, at(0))
    a = routing.assignment
    (ours,) = torch.autograd.grad(
        (a.weights_N * cotangent_TE[a.token_ids_N, a.expert_ids_N()]).sum(), router.weight_ED
    )
    leaf = router.weight_ED.detach().clone().requires_grad_()
    u_TE = z_TE @ leaf.T
    hidden_TE = {
        "identity": u_TE,
        "sigmoid": 1 / (1 + torch.exp(-u_TE)),
        "tanh": (torch.exp(u_TE) - torch.exp(-u_TE)) / (torch.exp(u_TE) + torch.exp(-u_TE)),
        "gelu": u_TE * (1 + torch.erf(u_TE / math.sqrt(2))) / 2,
    }[activation]
    power_TE = torch.exp(hidden_TE / 0.7)
    p_TE = power_TE / power_TE.sum(1, keepdim=True)
    (theirs,) = torch.autograd.grad((p_TE * cotangent_TE)[chosen(routing, T)].sum(), leaf)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_low_temperatures_make_one_expert_of_two():
    z_TE = normal(7, T, E)
    sharp = looking_at_logits("temperature", E, activation="tanh", tau_start=1e-3, tau_end=1e-3)
    flat = looking_at_logits("temperature", E, activation="tanh", tau_start=1e3, tau_end=1e3)
    weights = [dense_weights(r(z_TE, at(0)), T).amax(1) for r in (sharp, flat)]
    assert float(weights[0].mean()) > 0.97
    assert torch.allclose(weights[1], torch.full((T,), 0.5).double(), atol=1e-3)

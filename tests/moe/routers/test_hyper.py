"""HyperRouter against loops over its network; what is fixed stays so, and what is trained is one vector.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

import math

import pytest
import torch
from router_cases import dense_weights, normal
from torch import nn

from moetrain.moe import RouterContext, build_router
from moetrain.moe.routers.hyper import HyperRouter
from moetrain.train.optim.build import build_optimizer
from moetrain.train.optim.options import AdamWConfig

D, E, T, K = 5, 7, 11, 3
FIXED = ("hidden_HD", "hidden_bias_H", "made_GH", "made_bias_G")


def hyper(seed: int = 0, hidden: int = 13) -> HyperRouter:
    torch.manual_seed(seed)
    router = build_router("hyper", d_model=D, num_experts=E, top_k=K, hidden=hidden).double()
    assert isinstance(router, HyperRouter)
    return router


def by_hand(router: HyperRouter, e_D: list[float], x_TD: list[list[float]]) -> list[list[float]]:
    """Each token's weights of all experts: the network, the router that it makes, and a softmax over K."""
    fixed = {name: getattr(router, name).tolist() for name in FIXED}
    hidden = [
        max(0.0, bias + sum(w * e for w, e in zip(row, e_D, strict=True)))
        for row, bias in zip(fixed["hidden_HD"], fixed["hidden_bias_H"], strict=True)
    ]
    made = [
        bias + sum(w * h for w, h in zip(row, hidden, strict=True))
        for row, bias in zip(fixed["made_GH"], fixed["made_bias_G"], strict=True)
    ]
    weights_TE = []
    for x_D in x_TD:
        logits = []
        for expert in range(E):
            of_expert = made[expert * (D + 1) : (expert + 1) * (D + 1)]
            logits.append(of_expert[D] + sum(w * x for w, x in zip(of_expert, x_D, strict=False)))
        best = sorted(range(E), key=lambda expert, z=logits: -z[expert])[:K]
        total = sum(math.exp(logits[expert]) for expert in best)
        weights_TE.append([math.exp(z) / total if e in best else 0.0 for e, z in enumerate(logits)])
    return weights_TE


@pytest.mark.parametrize("training", [True, False])
def test_the_router_is_what_the_network_makes_of_the_vector(training):
    router, x_TD = hyper().train(training), normal(1, T, D)
    routing = router(x_TD, RouterContext.default(1, T))
    found_TE = torch.zeros(T, E, dtype=torch.float64)
    a = routing.assignment
    found_TE = found_TE.index_put((a.token_ids_N, a.expert_ids_N()), a.weights_N)
    expected = by_hand(router, router.embedding_1D[0].tolist(), x_TD.tolist())
    torch.testing.assert_close(found_TE.tolist(), expected, rtol=1e-12, atol=1e-12)
    direction_TE = normal(2, T, E)
    (found_TE * direction_TE).sum().backward()
    for name in FIXED:
        assert getattr(router, name).grad is None
    step, slopes = 1e-6, []
    for place in range(D):
        ends = []
        for sign in (1, -1):
            e_D = router.embedding_1D[0].tolist()
            e_D[place] += sign * step
            weights_TE = torch.tensor(by_hand(router, e_D, x_TD.tolist()), dtype=torch.float64)
            ends.append(float((weights_TE * direction_TE).sum()))
        slopes.append((ends[0] - ends[1]) / (2 * step))
    torch.testing.assert_close(router.embedding_1D.grad[0].tolist(), slopes, rtol=1e-6, atol=1e-8)


def test_an_optimizer_moves_the_vector_alone():
    router, x_TD = hyper(), normal(1, T, D)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    optimizer = build_optimizer(router, AdamWConfig(lr=0.1, weight_decay=0.5))
    for _ in range(3):
        router(x_TD, RouterContext.default(1, T)).assignment.weights_N.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [name for name, value in router.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["embedding_1D"]


def test_the_state_holds_the_whole_router():
    x_TD, ctx = normal(1, T, D), RouterContext.default(1, T)
    one, same, other = hyper(0), hyper(0), hyper(1)
    assert torch.equal(dense_weights(one(x_TD, ctx), T), dense_weights(same(x_TD, ctx), T))
    assert not torch.equal(dense_weights(one(x_TD, ctx), T), dense_weights(other(x_TD, ctx), T))
    other.load_state_dict(one.state_dict())
    assert torch.equal(dense_weights(one(x_TD, ctx), T), dense_weights(other(x_TD, ctx), T))
    with torch.no_grad():
        other.embedding_1D.mul_(-1)
    weight_ED, bias_E = one.made(torch.float64)
    turned_ED, turned_E = other.made(torch.float64)
    assert not (weight_ED == turned_ED).any()
    assert not (bias_E == turned_E).any()


def test_the_network_begins_as_a_linear_layer_of_torch():
    """Of the same variances: 1 / (3 inputs) for weights and biases alike."""
    torch.manual_seed(3)
    width, hidden = 64, 512
    router = build_router("hyper", d_model=width, num_experts=16, hidden=hidden)
    for name, theirs in (("hidden_HD", nn.Linear(width, hidden)), ("made_GH", nn.Linear(hidden, 4096))):
        assert abs(float(getattr(router, name).detach().std() / theirs.weight.detach().std()) - 1) < 0.02
    assert abs(float(router.made_bias_G.detach().std() * (3 * hidden) ** 0.5) - 1) < 0.1

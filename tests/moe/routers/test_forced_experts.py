"""Routers that take given experts: weights by hand from the present scores, and their gradients.

Shapes: T tokens, E experts, K chosen.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from router_cases import dense_weights, looking_at_logits, normal
from torch import Tensor

from moetrain.moe import ROUTERS, RouterContext
from moetrain.router_tools.check import obeys_a_record

T, E = 11, 7
LINEAR = {
    "topk": {},
    "topk, softmax after": {"score": "softmax_after"},
    "sigmoid": {"num_groups": 1, "route_scale": 2.5},
    "straight_through": {},
    "grouped": {"num_groups": 1},
    "sigma": {"top_k": 2},
}


def given(seed: int) -> Tensor:
    """Two experts a token, not those of the highest scores, in no order."""
    return torch.stack(
        [torch.randperm(E, generator=torch.Generator().manual_seed(seed + t))[:2] for t in range(T)]
    )


def by_hand(name: str, z_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """The weights [T, K], one token after the other."""
    rows = []
    for z_E, ids_K in zip(z_TE.unbind(), ids_TK.tolist(), strict=True):
        chosen = [z_E[e] for e in ids_K]
        softmax = [z.exp() / z_E.exp().sum() for z in chosen]
        if name in ("topk", "topk, softmax after"):
            row = [p / sum(softmax) for p in softmax]
        elif name == "sigmoid":
            scores = [1 / (1 + (-z).exp()) for z in chosen]
            row = [2.5 * s / sum(scores) for s in scores]
        elif name == "sigma":
            row = [1 / (1 + (-z).exp()) for z in chosen]
        else:
            row = softmax
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LINEAR)
def test_weights_and_gradients_are_of_the_present_scores(name: str, training: bool) -> None:
    router = looking_at_logits(name.split(",")[0], E, **LINEAR[name]).train(training)
    z_TE, ids_TK = normal(0, T, E).requires_grad_(), given(1)
    ctx = replace(RouterContext.default(1, T), forced={0: ids_TK})
    routing = router(z_TE, ctx)
    right_TK = by_hand(name, z_TE, ids_TK)
    right_TE = torch.zeros(T, E, dtype=torch.float64).scatter(1, ids_TK, right_TK)
    found_TE = torch.zeros(T, E, dtype=torch.float64).index_put(
        (routing.assignment.token_ids_N, routing.assignment.expert_ids_N()), routing.assignment.weights_N
    )
    probe_TE = normal(2, T, E)
    grads = [
        torch.autograd.grad((w * probe_TE).sum(), z_TE, retain_graph=True)[0] for w in (right_TE, found_TE)
    ]
    if name != "straight_through":  # whose weights are 1 / k forward
        torch.testing.assert_close(found_TE, right_TE, rtol=0, atol=1e-14)
    else:
        assert set(dense_weights(routing, T).flatten().tolist()) == {0.0, 0.5}
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-14)
    assert float(grads[0].abs().max()) > 1e-3
    assert (dense_weights(routing, T) > 0).equal(right_TE > 0)


def test_who_can_be_replayed() -> None:
    replays = {name for name, spec in ROUTERS.items() if spec.cls.replays}
    assert replays >= {"topk", "switch", "sigmoid", "cosine", "straight_through", "sigma", "grouped", "moepp"}
    assert not replays & {"relu", "expert_choice", "base", "dense", "hash"}


@pytest.mark.parametrize("name", sorted(name for name, spec in ROUTERS.items() if spec.cls.replays))
def test_who_says_that_it_replays_does(name: str) -> None:
    """A subclass may inherit the word and choose by another rule."""
    obeys_a_record(name)

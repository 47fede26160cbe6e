"""ModuleFormer's gate by hand, what it draws, and growth: old rows stay to the bit, new ones are penalised.

Shapes: T tokens, D model, E experts, K top-k, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from router_cases import dense_weights, normal
from torch import Tensor

from moetrain.moe import Router, RouterContext, build_router

D, E, K, H, T = 5, 7, 3, 11, 13


def built(**options: int) -> Router:
    torch.manual_seed(4)
    return build_router("module_former", d_model=D, num_experts=E, top_k=K, hidden=H, **options).double()


def by_hand(router: Router, x_D: list[float]) -> tuple[list[float], list[float]]:
    """(probabilities, weights) of one token: floats and loops."""
    rows = [router.hidden_HD.tolist(), router.hidden_bias_H.tolist(), router.weight_EH.tolist()]
    hidden = []
    for row, bias in zip(rows[0], rows[1], strict=True):
        z = bias + sum(a * b for a, b in zip(row, x_D, strict=True))
        hidden.append(0.5 * z * (1 + math.erf(z / math.sqrt(2))))
    powers = [math.exp(sum(a * b for a, b in zip(row, hidden, strict=True))) for row in rows[2]]
    p = [power / sum(powers) for power in powers]
    best = sorted(range(E), key=lambda e: -p[e])[:K]
    return p, [p[e] if e in best else 0.0 for e in range(E)]


@pytest.mark.parametrize("training", [True, False])
def test_the_gate_is_a_network_and_weights_are_its_probabilities(training: bool) -> None:
    router, x_TD = built().train(training), 3 * normal(0, T, D)
    routing = router(x_TD, RouterContext.default(1, T))
    found = [by_hand(router, x_D) for x_D in x_TD.tolist()]
    scores_TE = torch.tensor([p for p, _ in found], dtype=torch.float64)
    torch.testing.assert_close(routing.scores_TE, scores_TE, rtol=1e-12, atol=1e-12)
    weights_TE = torch.tensor([weights for _, weights in found], dtype=torch.float64)
    torch.testing.assert_close(dense_weights(routing, T), weights_TE, rtol=1e-12, atol=1e-12)
    assert routing.penalty is None


def test_the_gradient_is_that_of_the_formula() -> None:
    router, x_TD, cotangent_TE = built(), normal(1, T, D).requires_grad_(), normal(2, T, E)
    a = router(x_TD, RouterContext.default(1, T)).assignment
    wanted = [x_TD, *router.parameters()]
    ours = torch.autograd.grad((a.weights_N * cotangent_TE[a.token_ids_N, a.expert_ids_N()]).sum(), wanted)
    z_TH = x_TD @ router.hidden_HD.T + router.hidden_bias_H
    p_TE = ((z_TH * 0.5 * (1 + torch.erf(z_TH * 0.5**0.5))) @ router.weight_EH.T).exp()
    p_TE = p_TE / p_TE.sum(1, keepdim=True)
    taken_TE = p_TE >= p_TE.sort(1).values[:, -K, None]
    theirs = torch.autograd.grad((p_TE * taken_TE * cotangent_TE).sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_draws_are_by_probability_without_replacement() -> None:
    """One token, many times: the best is always there, pairs of the rest as often as their chances say."""
    router, number = built(sampled=2), 4000
    x_1D = 2 * normal(3, 1, D)
    p, _ = by_hand(router, x_1D[0].tolist())
    weights_TE = dense_weights(router(x_1D.expand(number, D), RouterContext.default(1, number)), number)
    best = max(range(E), key=lambda e: p[e])
    assert bool((weights_TE[:, best] > 0).all())
    assert (weights_TE > 0).sum(1).tolist() == [K] * number
    rest = [e for e in range(E) if e != best]
    total = sum(p[e] + 1e-6 for e in rest)
    for e in rest:
        chance = (p[e] + 1e-6) / total
        for other in rest:  # it comes second
            if other != e:
                chance += (p[other] + 1e-6) / total * (p[e] + 1e-6) / (total - p[other] - 1e-6)
        seen = int((weights_TE[:, e] > 0).sum())
        assert abs(seen - number * chance) < 5 * math.sqrt(number * chance * (1 - chance) + 1)
    again = router.eval()(x_1D.expand(3, D), RouterContext.default(1, 3))
    assert len(set(again.assignment.expert_ids_N().tolist())) == K  # evaluation draws nothing


def trained(router: Router, steps: int = 3) -> dict[str, Tensor]:
    decayed = [p for p in router.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(decayed, lr=0.1, weight_decay=0.0)
    for step in range(steps):
        x_TD = normal(10 + step, T, D)
        routing = router(x_TD, RouterContext.default(1, T))
        loss = routing.scores_TE.square().sum() + (0 if routing.penalty is None else routing.penalty)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in router.named_parameters()}


def test_old_rows_and_the_network_stay_and_new_rows_pay() -> None:
    router = built(held=5)
    before = {name: p.detach().clone() for name, p in router.named_parameters()}
    penalty = router(normal(5, T, D), RouterContext.default(1, T)).penalty
    new = before["weight_EH"][5:].flatten().tolist()
    assert float(penalty) == pytest.approx(sum(w * w for w in new) / len(new), rel=1e-12)
    (gradient,) = torch.autograd.grad(penalty, router.weight_EH)
    assert torch.equal(gradient[:5], torch.zeros(5, H, dtype=torch.float64))
    torch.testing.assert_close(gradient[5:], 2 * before["weight_EH"][5:] / len(new), rtol=1e-12, atol=0)
    after = trained(router)
    assert torch.equal(after["hidden_HD"], before["hidden_HD"])
    assert torch.equal(after["weight_EH"][:5], before["weight_EH"][:5])
    assert bool((after["weight_EH"][5:] != before["weight_EH"][5:]).all())
    assert not torch.equal(trained(built())["weight_EH"][:5], before["weight_EH"][:5])


def test_forced_experts_and_options_that_cannot_be() -> None:
    forced = torch.tensor([[6, 0, 3]]).expand(T, K)
    a = built(sampled=3)(normal(1, T, D), replace(RouterContext.default(1, T), forced={0: forced})).assignment
    assert a.counts_E.tolist() == [T, 0, 0, T, 0, 0, T]
    for options, line in (
        ({"sampled": 4}, r"router\.sampled=4 exceeds router\.top_k=3"),
        ({"held": 7}, r"router\.held=7 holds all of num_experts=7"),
    ):
        with pytest.raises(ValueError, match=line):
            built(**options)

"""GW-MoE: who goes to all experts, by loops; and that it is top-k everywhere else.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from router_cases import chosen, dense_weights, looking_at_logits, normal

from moetrain.moe import RouterContext

E, B, S = 5, 3, 17


def context() -> RouterContext:
    return replace(RouterContext.default(B, S), valid_T=torch.arange(B * S) % 7 != 3)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("slots", [None, 0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_unsure_tokens_go_to_all_in_training(training, slots, renormalize):
    threshold = 1.3
    options = {"threshold": threshold, "slots": slots, "top_k": 2, "renormalize": renormalize}
    router, ctx = looking_at_logits("gw", E, **options).train(training), context()
    z_TE = normal(1, B * S, E).requires_grad_()
    routing = router(z_TE, ctx)
    routing.check()
    rows, broadcast = [], [0] * B
    for t in range(B * S):
        total = sum(math.exp(z) for z in z_TE[t].tolist())
        p = [math.exp(z) / total for z in z_TE[t].tolist()]
        unsure = -sum(x * math.log(x) for x in p) >= threshold and t % 7 != 3
        if unsure:
            broadcast[t // S] += 1
        if t % 7 == 3:
            rows.append([0.0] * E)
        elif training and unsure and (slots is None or broadcast[t // S] <= slots):
            rows.append(p)
        else:
            best = sorted(range(E), key=lambda e, p=p: -p[e])[:2]
            scale = sum(p[e] for e in best) if renormalize else 1.0
            rows.append([x / scale if e in best else 0.0 for e, x in enumerate(p)])
    assert max(broadcast) in range(3, S - 3)  # some of both kinds, and more than slots
    expected_TE = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(dense_weights(routing, B * S), expected_TE, rtol=1e-12, atol=0)
    assert torch.equal(chosen(routing, B * S), expected_TE > 0)
    direction_TE = normal(2, B * S, E)
    a = routing.assignment
    (a.weights_N * direction_TE[a.token_ids_N, a.expert_ids_N()]).sum().backward()
    q_TE = z_TE.detach().clone().requires_grad_()
    p_TE = q_TE.exp() / q_TE.exp().sum(-1, keepdim=True)
    taken_TE = p_TE * (expected_TE > 0)
    if renormalize:
        taken_TE = taken_TE / torch.where(
            (expected_TE > 0).any(-1, keepdim=True), taken_TE.sum(-1, keepdim=True), 1
        )
    (taken_TE * direction_TE).sum().backward()
    torch.testing.assert_close(z_TE.grad, q_TE.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_threshold_above_the_largest_entropy_is_top_k(top_k):
    z_TE, ctx = normal(3, B * S, E), context()
    ours = looking_at_logits("gw", E, top_k=top_k, threshold=math.log(E) + 1e-9)(z_TE, ctx)
    plain = looking_at_logits("topk", E, top_k=top_k, renormalize=False)(z_TE, ctx)
    assert torch.equal(dense_weights(ours, B * S), dense_weights(plain, B * S))


def test_a_threshold_of_zero_is_the_whole_mixture():
    z_TE, ctx = normal(3, B * S, E), replace(context(), valid_T=None)
    z_TE[4] = torch.tensor([0.0, 2000.0, 0.0, 0.0, 0.0])  # of entropy 0
    routing = looking_at_logits("gw", E, threshold=0.0)(z_TE, ctx)
    assert torch.equal(dense_weights(routing, B * S), z_TE.softmax(-1))
    assert bool(chosen(routing, B * S).all())


def test_equal_logits_are_unsure_and_infinite_ones_are_not():
    router = looking_at_logits("gw", E, threshold=1.6)
    z_TE = torch.zeros(2, E, dtype=torch.float64)
    z_TE[1, 2:] = -math.inf  # two experts are left: ln 2
    assert chosen(router(z_TE, RouterContext.default(1, 2)), 2).sum(1).tolist() == [5, 1]

"""MoEC: who is left out and for how long, and the share of variance within clusters, by loops.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from router_cases import chosen, dense_weights, normal

from moetrain.moe import MoELayer, RouterContext, build_router
from moetrain.moe.routers.moec import MoECRouter

D, E, B, S = 5, 11, 3, 13
T = B * S
CLUSTERS = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]  # of e * 4 // 11, but for the first of each
IN = [2, 2, 2, 1]


def moec(**options: object) -> MoECRouter:
    torch.manual_seed(1)
    router = build_router("moec", d_model=D, num_experts=E, width=4, clusters=4, period=3, **options)
    assert isinstance(router, MoECRouter)
    return router.double()


def context(step: int = 0, layer: int = 0, seed: int = 0) -> RouterContext:
    valid_T = torch.arange(T) % 5 != 2
    return replace(RouterContext.default(B, S), valid_T=valid_T, step=step, layer=layer, seed=seed)


def survivors(router: MoECRouter, **where: int) -> list[int]:
    return router.survivors(context(**where)).nonzero().flatten().tolist()


def test_half_of_each_cluster_is_out_for_a_period():
    router = moec()
    assert [[e for e in range(E) if router.cluster_E[e] == c] for c in range(4)] == CLUSTERS
    found = [survivors(router, step=step) for step in range(60)]
    for at, alive in enumerate(found):
        assert [sum(e in cluster for e in alive) for cluster in CLUSTERS] == IN
        assert alive == found[at - at % 3]
    assert len({tuple(alive) for alive in found}) > 10
    often = [sum(e in alive for alive in found[::3]) for e in range(E)]
    assert min(often) > 0  # none is out for ever
    assert survivors(router, layer=1) != survivors(router) or survivors(router, layer=2) != survivors(router)
    assert any(survivors(router, seed=seed) != survivors(router) for seed in (1, 2))
    assert survivors(router.eval()) == list(range(E))


def test_what_is_out_has_no_token_and_no_gradient():
    torch.manual_seed(1)
    layer = MoELayer(D, 4, E, router="moec", router_options={"clusters": 4, "top_k": 2}).double()
    ctx = context(step=4)
    y_BSD, routing = layer(normal(1, B, S, D), ctx)
    (y_BSD.square().sum() + routing.penalty).backward()
    alive_E = layer.router.survivors(ctx)
    assert torch.equal(routing.demand_E > 0, alive_E & (routing.demand_E > 0))
    assert not layer.experts.w_down_EFD.grad[~alive_E].any()
    assert not layer.experts.w_gate_up_EDCF.grad[~alive_E].any()
    assert not layer.router.centers_Ed.grad[~alive_E].any()
    assert layer.router.centers_Ed.grad[alive_E].any()


@pytest.mark.parametrize("training", [True, False])
def test_weights_and_penalty_by_loops(training):
    router, ctx = moec(top_k=2).train(training), context(step=7)
    x_TD = normal(2, T, D).requires_grad_()
    routing = router(x_TD, ctx)
    routing.check()
    alive = survivors(router, step=7)
    z_TE, expected_TE, shares = router.logits(x_TD), torch.zeros(T, E, dtype=torch.float64), []
    for t in range(T):
        total = sum(z_TE[t, e].exp() for e in alive)
        p = {e: z_TE[t, e].exp() / total for e in alive}
        if not ctx.valid_T[t]:
            continue
        for e in sorted(alive, key=lambda e, p=p: -float(p[e].detach()))[:2]:
            expected_TE[t, e] = p[e].detach()
        whole = sum((p[e] - sum(p.values()) / len(p)) ** 2 for e in alive)
        inner = 0.0
        for cluster in CLUSTERS:
            own = [p[e] for e in cluster if e in alive]
            inner = inner + sum((q - sum(own) / len(own)) ** 2 for q in own)
        shares.append(inner / whole)
    torch.testing.assert_close(dense_weights(routing, T), expected_TE, rtol=1e-11, atol=0)
    expected = sum(shares) / len(shares)
    torch.testing.assert_close(routing.penalty, expected, rtol=1e-10, atol=0)
    ours, theirs = (torch.autograd.grad(v, x_TD, retain_graph=True)[0] for v in (routing.penalty, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)
    assert 0.2 < float(expected.detach()) < 1


def test_without_dropout_it_is_the_cosine_router():
    x_TD, ctx = normal(2, T, D), context()
    ours = moec(top_k=2, dropout=0.0)
    plain = build_router("cosine", d_model=D, num_experts=E, width=4, top_k=2).double()
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(dense_weights(ours(x_TD, ctx), T), dense_weights(plain(x_TD, ctx), T))


def test_the_penalty_is_of_clusters():
    """0 where all of a cluster are as likely, 1 where clusters are, and 0 without any difference."""
    router, in_E = moec(), torch.ones(E, dtype=torch.bool)
    alike = torch.tensor([0.2] * 3 + [0.1] * 3 + [0.02] * 3 + [0.02] * 2).double()
    p_TE = torch.stack([alike, torch.full((E,), 1 / E).double(), torch.zeros(E).double()])
    p_TE[2] = torch.tensor([0.15, 0.05, 0.1] * 3 + [0.15, 0.05]).double()
    found_T = router._within(p_TE, in_E)
    torch.testing.assert_close(found_T, torch.tensor([0.0, 0.0, 1.0]).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": 12}, "router.clusters=12 exceeds num_experts=11"),
        ({"top_k": 8}, "exceeds the 7 experts"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        build_router("moec", d_model=D, num_experts=E, **({"clusters": 4} | options))


def test_every_rank_and_token_sees_the_same_draw():
    router, x_TD = moec(), normal(2, T, D)
    whole = chosen(router(x_TD, context(step=2)), T)
    ctx = replace(
        context(step=2), batch=1, sample_ids_B=torch.tensor([2]), valid_T=context().valid_T[2 * S :]
    )
    assert torch.equal(chosen(router(x_TD[2 * S :], ctx), S), whole[2 * S :])

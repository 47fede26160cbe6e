"""StableMoE against loops: who chooses when, what is learnt of it, and what its losses are.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from balance_cases import balance_loss
from router_cases import normal
from torch import Tensor

from moetrain.moe import RouterContext, Routing, build_router
from moetrain.moe.balance import StepTotals
from moetrain.moe.balance.load_share import first_choices_BE
from moetrain.moe.routers.stable import StableRouter

D, E, WORDS = 5, 7, 11
SWITCH = 4


def stable(training: bool = True) -> StableRouter:
    torch.manual_seed(3)
    router = build_router("stable", d_model=D, num_experts=E, switch_step=SWITCH, width=3, vocabulary=WORDS)
    assert isinstance(router, StableRouter)
    with torch.no_grad():
        router.weight_ED.mul_(10)
        router.distilled_EW.mul_(10)
    return router.double().train(training)


def context(batch: int, seq: int, step: int = 0, padded: bool = False) -> RouterContext:
    draw = torch.Generator().manual_seed(4)
    ids_T = torch.randint(0, 3 * WORDS, (batch * seq,), generator=draw)
    valid_T = torch.rand(batch * seq, generator=draw) < 0.6 if padded else None
    return replace(RouterContext.default(batch, seq), token_ids_T=ids_T, valid_T=valid_T, step=step)


def product(row: list[float], column: list[float]) -> float:
    return sum(a * b for a, b in zip(row, column, strict=True))


def logits_by_hand(router: StableRouter, x_TD: Tensor, ctx: RouterContext) -> tuple[list, list]:
    """Those of the learnt router and of the distilled one."""
    words, distilled = router.words_VW.tolist(), router.distilled_EW.tolist()
    own = [[product(x_D, w_D) for w_D in router.weight_ED.tolist()] for x_D in x_TD.tolist()]
    of_ids = [[product(words[i % WORDS], c) for c in distilled] for i in ctx.token_ids_T.tolist()]
    return own, of_ids


def chosen(routing: Routing) -> dict[int, int]:
    a = routing.assignment
    return dict(zip(a.token_ids_N.tolist(), a.expert_ids_N().tolist(), strict=True))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("training", "step", "learns"), [(True, SWITCH - 1, True), (True, SWITCH, False), (False, 0, False)]
)
def test_who_chooses_with_which_weight(training, step, learns, padded):
    router, x_TD, ctx = stable(training), normal(1, 26, D), context(2, 13, step, padded)
    routing = router(x_TD, ctx)
    own, of_ids = logits_by_hand(router, x_TD, ctx)
    valid = [t for t in range(26) if ctx.valid_T is None or ctx.valid_T[t]]
    who = own if learns else of_ids
    expected = {t: max(range(E), key=lambda e, z=who[t]: z[e]) for t in valid}
    assert chosen(routing) == expected
    assert expected != {t: max(range(E), key=lambda e, z=(of_ids if learns else own)[t]: z[e]) for t in valid}
    a = routing.assignment
    for t, e, weight in zip(
        a.token_ids_N.tolist(), a.expert_ids_N().tolist(), a.weights_N.tolist(), strict=True
    ):
        assert weight == pytest.approx(1 / (1 + math.exp(-own[t][e])), rel=1e-12)
    wrong = 0.0
    for t in valid if learns else []:
        wrong += math.log(sum(math.exp(z) for z in of_ids[t])) - of_ids[t][expected[t]]
    assert float(routing.penalty.detach()) == pytest.approx(wrong / len(valid), rel=1e-12, abs=1e-15)


def test_the_distilled_router_learns_from_its_loss_alone():
    router, x_TD, ctx = stable(), normal(1, 26, D).requires_grad_(), context(2, 13)
    routing = router(x_TD, ctx)
    routing.penalty.backward()
    assert router.weight_ED.grad is None
    assert x_TD.grad is None
    own, of_ids = logits_by_hand(router, x_TD.detach(), ctx)
    gradient = torch.zeros(
        E, 3, dtype=torch.float64
    )  # of the distilled rows: sum of (p - 1 of the chosen) word
    for t, (z, d) in enumerate(zip(own, of_ids, strict=True)):
        p = torch.tensor(d, dtype=torch.float64).exp()
        p /= p.sum()
        p[max(range(E), key=lambda e, z=z: z[e])] -= 1
        gradient += torch.outer(p, router.words_VW.detach()[int(ctx.token_ids_T[t]) % WORDS]) / 26
    torch.testing.assert_close(router.distilled_EW.grad, gradient, rtol=1e-10, atol=1e-12)
    unseen = sorted(set(range(WORDS)) - {i % WORDS for i in ctx.token_ids_T.tolist()})
    assert not router.words_VW.grad[unseen].any()
    router(x_TD, ctx).assignment.weights_N.sum().backward()
    assert router.weight_ED.grad is not None


@pytest.mark.parametrize(("training", "step"), [(True, SWITCH), (False, 0)])
def test_a_frozen_router_sees_ids_alone_and_has_no_gradient(training, step):
    router, ctx = stable(training), context(2, 13, step)
    first = router(normal(1, 26, D), ctx)
    later = router(normal(2, 26, D), replace(ctx, step=step + 50))
    assert chosen(first) == chosen(later)
    by_id: dict[int, set[int]] = {}
    for t, e in chosen(first).items():
        by_id.setdefault(int(ctx.token_ids_T[t]) % WORDS, set()).add(e)
    assert {len(experts) for experts in by_id.values()} == {1}
    (first.assignment.weights_N.sum() + first.penalty).backward()
    assert router.words_VW.grad is None
    assert router.distilled_EW.grad is None
    assert router.weight_ED.grad.any()
    assert not first.scores_TE.requires_grad


def test_what_is_frozen_is_a_function_of_the_step():
    router = stable()
    assert router.frozen(SWITCH - 1) == ()
    assert {id(p) for p in router.frozen(SWITCH)} == {id(router.words_VW), id(router.distilled_EW)}


@pytest.mark.parametrize("step", [0, SWITCH])
def test_weights_by_gradcheck(step):
    router, ctx = stable(), context(2, 5, step)
    x_TD = normal(1, 10, D).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: router(x, ctx).assignment.weights_N, [x_TD])


def test_ids_are_needed():
    with pytest.raises(ValueError, match="router=stable needs token ids"):
        stable()(normal(1, 4, D), RouterContext.default(1, 4))


@pytest.mark.parametrize("scope", ["micro", "sequence", "global_batch", "running"])
def test_the_excess_loss_by_hand(scope):
    """Of each valid token: (E f - 1) s, f the share of first choices of its best expert, s its sigmoid."""
    x_TD, ctx = normal(1, 26, D).requires_grad_(), context(2, 13, padded=True)
    router = stable()
    routing = router(x_TD, ctx)
    valid = [t for t in range(26) if ctx.valid_T[t]]
    running_E = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.1, 0.15, 0.05], dtype=torch.float64)
    counts = {"excess_global_batch": {0: first_choices_BE(routing).sum(0)}}
    totals = StepTotals(float(len(valid)), counts, {"running_load": {0: running_E}})
    found = balance_loss(routing, "excess", scope, totals)
    z_TE = x_TD @ router.weight_ED.detach().t()
    best = {t: int(z_TE[t].argmax()) for t in valid}
    expected = torch.zeros((), dtype=torch.float64)
    for t in valid:
        seen = [u for u in valid if scope != "sequence" or u // 13 == t // 13]
        share = sum(best[u] == best[t] for u in seen) / len(seen)
        if scope == "running":
            share = float(running_E[best[t]])
        expected = expected + (E * share - 1) / (1 + torch.exp(-z_TE[t, best[t]])) / len(valid)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    ours, theirs = (torch.autograd.grad(loss, x_TD, retain_graph=True)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert ours.abs().max() > 1e-3

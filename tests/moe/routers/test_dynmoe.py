"""DynMoE: thresholds, the straight-through gate, and experts that fall asleep and wake."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from balance_cases import balance_loss
from torch import Tensor

from moetrain.moe import Router, RouterContext, Routing, build_router
from moetrain.moe.balance import StepTotals

D, E = 7, 5


def router_of(**options: object) -> Router:
    torch.manual_seed(0)
    router = build_router("dynmoe", d_model=D, num_experts=E, **options).double().train()
    with torch.no_grad():
        router.threshold_E.normal_(std=0.1)
        router.log_tau_1.fill_(0.7)
    return router


def route(router: Router, x_TD: Tensor) -> Routing:
    return router(x_TD, RouterContext.default(1, x_TD.shape[0]))


def test_active_above_the_threshold_with_one_over_their_number():
    router, x_TD = router_of(), torch.randn(53, D, dtype=torch.float64)
    routing = route(router, x_TD)
    tau = router.log_tau_1.exp()
    cosine_TE = torch.stack(
        [torch.nn.functional.cosine_similarity(x_TD, w_D[None]) for w_D in router.weight_ED], -1
    )
    active_TE = (tau * cosine_TE).sigmoid() > (tau * router.threshold_E).sigmoid()
    assert 0 < active_TE.sum() < active_TE.numel()
    assert torch.equal(routing.demand_E, active_TE.sum(0))
    weights_N = 1 / active_TE.sum(-1)[routing.assignment.token_ids_N].double()
    torch.testing.assert_close(routing.assignment.weights_N, weights_N)


def test_the_gradient_of_a_gate_is_that_of_score_minus_threshold():
    router, x_TD = router_of(), torch.randn(53, D, dtype=torch.float64)
    routing = route(router, x_TD)
    parameters = [router.weight_ED, router.threshold_E, router.log_tau_1]
    toll_N = torch.randn(routing.assignment.weights_N.shape, dtype=torch.float64)
    found = torch.autograd.grad((routing.assignment.weights_N * toll_N).sum(), parameters)
    tau = router.log_tau_1.exp()
    over_TE = router.logits(x_TD).sigmoid() - (tau * router.threshold_E).sigmoid()
    number_T = torch.bincount(routing.assignment.token_ids_N, minlength=53)
    over_N = (
        over_TE[routing.assignment.token_ids_N, routing.assignment.expert_ids_N()]
        / number_T[routing.assignment.token_ids_N]
    )
    expected = torch.autograd.grad((over_N * toll_N).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_token_without_expert_gets_its_best_in_evaluation():
    router = router_of()
    with torch.no_grad():
        router.threshold_E.fill_(30.0)
        router.awake_E[0] = False
    x_TD = torch.randn(11, D, dtype=torch.float64)
    assert route(router, x_TD).assignment.counts_E.sum() == 0
    routing = route(router.eval(), x_TD)
    assert sorted(routing.assignment.token_ids_N.tolist()) == list(range(11))
    best_T = router.logits(x_TD)[:, 1:].argmax(-1) + 1
    assert torch.equal(routing.assignment.counts_E, torch.bincount(best_T, minlength=E))
    assert routing.assignment.weights_N.tolist() == [1.0] * 11


def test_the_penalty_is_of_experts_awake_and_sums_over_batches():
    router = router_of(initial_experts=3)
    w = router.weight_ED.detach()[:3]
    u = w / w.norm(dim=-1, keepdim=True)
    value = (u @ u.t() - torch.eye(3, dtype=torch.float64)).norm() + w.norm(dim=-1).mean()
    parts = [route(router, torch.randn(n, D, dtype=torch.float64)) for n in (3, 11)]
    total = sum(balance_loss(part, "penalty", "micro", StepTotals(14)) for part in parts)
    torch.testing.assert_close(total, value, rtol=0, atol=1e-9)
    total.backward()
    assert not router.weight_ED.grad[3:].any()


def stats_of(counts: list[int], missed: Tensor) -> Tensor:
    number = torch.tensor([len(missed)], dtype=torch.float64)
    return torch.cat([torch.tensor(counts, dtype=torch.float64), number, missed.sum(0)])


def test_unused_experts_sleep_and_one_wakes_for_missed_tokens():
    router = router_of(initial_experts=4, interval=2)
    before = {k: v.clone() for k, v in router.state_dict().items()}
    missed_TD = torch.randn(3, D, dtype=torch.float64)
    router.after_step(stats_of([5, 0, 2, 0, 0], missed_TD))
    assert router.awake_E.tolist() == [True] * 4 + [False]  # not yet: it counts over two steps
    router.after_step(stats_of([1, 0, 0, 1, 0], missed_TD[:0]))
    assert router.awake_E.tolist() == [True, True, True, True, False]  # 1 slept, and woke as a new one
    direction_D = missed_TD.sum(0) / missed_TD.sum(0).norm()
    torch.testing.assert_close(router.weight_ED[1], direction_D)
    assert router.threshold_E[1] == 0
    others = [0, 2, 3, 4]
    assert torch.equal(router.weight_ED[others], before["weight_ED"][others])
    assert torch.equal(router.threshold_E[others], before["threshold_E"][others])
    assert not router.taken_E.any()
    assert not router.missed_1.any()
    for _ in range(2):
        router.after_step(stats_of([1, 0, 1, 0, 0], missed_TD[:0]))
    assert router.awake_E.tolist() == [True, False, True, False, False]
    for _ in range(2):
        router.after_step(stats_of([0] * 5, missed_TD[:0]))
    assert router.awake_E.tolist() == [True, False, True, False, False]  # never all


def test_nobody_takes_an_expert_asleep():
    router = router_of(initial_experts=2)
    with torch.no_grad():
        router.threshold_E.fill_(-30.0)
    routing = route(router, torch.randn(13, D, dtype=torch.float64))
    assert routing.assignment.counts_E.tolist() == [13, 13, 0, 0, 0]
    assert not routing.scores_TE[:, 2:].any()


def test_statistics_leave_padding_out():
    router = router_of()
    with torch.no_grad():
        router.threshold_E.fill_(30.0)
    x_TD = torch.randn(6, D, dtype=torch.float64)
    ctx = replace(RouterContext.default(2, 3), valid_T=torch.tensor([1, 1, 0, 0, 1, 0], dtype=torch.bool))
    stats = router(x_TD, ctx).stats
    torch.testing.assert_close(stats, stats_of([0] * 5, x_TD[[0, 1, 4]]))


@pytest.mark.usefixtures("training")
def test_training_puts_experts_to_sleep_and_resumes(corpus, tmp_path):
    options = ["router=dynmoe", "router.interval=2", "router.initial_experts=1", "checkpoint.every=2"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert tiny.train(corpus, whole, *options, "train.steps=5") == 0
    assert tiny.train(corpus, part, *options, "train.steps=2") == 0
    assert tiny.train(corpus, part, *options, "train.steps=5") == 0
    assert tiny.steps(part) == tiny.steps(whole)
    awake = [t for k, t in tiny.contents(tiny.checkpoint(whole, 5))[0].items() if k.endswith("awake_E")]
    assert awake
    assert all(int(t.sum()) > 1 for t in awake)  # one expert misses tokens, so others woke


@pytest.mark.parametrize("options", [{"initial_experts": 0}, {"initial_experts": 6}, {"interval": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"router.{next(iter(options))}="):
        build_router("dynmoe", d_model=D, num_experts=E, **options)


@pytest.mark.parametrize(("tau", "learnt"), [(10.0, True), (1.0, False)])
def test_tau_starts_as_told_and_is_learnt_or_not(tau: float, learnt: bool) -> None:
    router = build_router("dynmoe", d_model=7, num_experts=5, tau=tau, learn_tau=learnt).double()
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(11, 7, generator=generator, dtype=torch.float64)
    logits_TE = router.logits(x_TD)
    cosine_TE = torch.nn.functional.cosine_similarity(x_TD[:, None], router.weight_ED[None], dim=-1)
    torch.testing.assert_close(logits_TE, tau * cosine_TE, rtol=1e-6, atol=1e-9)
    (slope_1,) = torch.autograd.grad(logits_TE.square().sum(), router.log_tau_1)
    assert bool(slope_1.any()) is learnt
    assert build_router("dynmoe", d_model=7, num_experts=5).options.tau == 10
    with pytest.raises(ValueError, match=r"router\.tau=0"):
        build_router("dynmoe", d_model=7, num_experts=5, tau=0.0)

"""Balance losses: their values, their gradients, padding, errors.

Shapes: T tokens, B sequences, E experts, L layers, K top-k.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from balance_cases import FORMS, balance_loss, routed, step_totals, z_loss
from torch import Tensor
from torch.utils._pytree import tree_map_only

from moetrain.moe import MoELayer, RouterContext, Routing
from moetrain.moe.balance import RunningLoad, StepTotals
from moetrain.moe.balance.base import SCOPES
from moetrain.moe.balance.load_share import first_choices_BE

ALL = list(itertools.product(FORMS, SCOPES))
PER_TOKEN = ("sum_over_k", "l1", "p_penalty")  # softmax scores sum to 1, and experts are of one width


def number(loss: Tensor) -> float:
    return float(loss.detach())


def totals_of(routings: list[Routing], running_E: Tensor | None = None) -> StepTotals:
    """The totals of a step whose micro-batches are these, in a model of one layer."""
    first_E = sum(first_choices_BE(r).sum(0) for r in routings)
    demand_E = sum(r.demand_E for r in routings)
    tokens = float(sum(int(r.num_tokens) for r in routings))
    return step_totals(tokens, {0: demand_E}, {0: first_E}, None if running_E is None else {0: running_E})


def by_hand(
    routings: list[Routing], form: str, scope: str, running: list[float], logits: list[Tensor]
) -> Tensor:
    """E / T sum_t sum_e f_e(t) p_te over every token of a step, by loops; softmax scores, nothing dropped."""

    @dataclass
    class Token:
        micro: int
        sequence: tuple[int, int]
        chosen: list[int]
        p: list[Tensor]

    tokens = []
    for m, (r, z_TE) in enumerate(zip(routings, logits, strict=True)):
        seq = z_TE.shape[0] // len(r.num_tokens_B)
        assigned = list(
            zip(r.assignment.token_ids_N.tolist(), r.assignment.expert_ids_N().tolist(), strict=True)
        )
        for t, z_E in enumerate(z_TE):
            if r.valid_T is None or r.valid_T[t]:
                power = torch.exp(z_E)
                tokens.append(
                    Token(m, (m, t // seq), [e for u, e in assigned if u == t], list(power / power.sum()))
                )
    loss, num_experts, k = torch.zeros((), dtype=torch.float64), logits[0].shape[1], len(tokens[0].chosen)
    for t in tokens:
        for e in range(num_experts):
            if scope == "running":
                f = running[e] * (k if form in PER_TOKEN else 1)
            else:
                key = {
                    "micro": lambda u: u.micro,
                    "sequence": lambda u: u.sequence,
                    "global_batch": lambda u: 0,
                }[scope]
                seen = [u for u in tokens if key(u) == key(t)]
                if form == "gshard_first":
                    f = sum(bool(max(u.p) == u.p[e]) for u in seen) / len(seen)
                else:
                    f = sum(u.chosen.count(e) for u in seen) / len(seen) / (1 if form in PER_TOKEN else k)
            loss = loss + f * t.p[e]
    return loss * num_experts / len(tokens)


@pytest.mark.parametrize(("form", "scope"), ALL)
@pytest.mark.parametrize("padded", [False, True])
def test_value_and_gradient_by_brute_force(form: str, scope: str, padded: bool) -> None:
    """A step of two micro-batches of unequal size; the second sequence of the first has its own length."""
    torch.manual_seed(1)
    logits = [torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (14, 7)]
    valid = torch.arange(14) % 7 < torch.tensor([7] * 7 + [3] * 7) if padded else None
    routings = [routed(logits[0], 2, valid, top_k=3), routed(logits[1], 1, top_k=3)]
    running_E = torch.tensor([0.4, 0.1, 0.25, 0.05, 0.2], dtype=torch.float64)
    totals = totals_of(routings, running_E)
    got = sum(balance_loss(r, form, scope, totals) for r in routings)
    want = by_hand(routings, form, scope, running_E.tolist(), logits)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    got_grads, want_grads = torch.autograd.grad(got, logits), torch.autograd.grad(want, logits)
    torch.testing.assert_close(got_grads, want_grads, rtol=0, atol=1e-12)
    assert all(g.abs().max() > 1e-4 for g in got_grads)


@pytest.mark.parametrize(("form", "scope"), ALL)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_value_at_perfect_balance(form: str, scope: str, k: int) -> None:
    """1, or k: by equal scores whatever the load, and by equal load whatever the scores."""
    want = k if form in PER_TOKEN else 1
    uniform = routed(torch.zeros(21, 5, dtype=torch.float64), 3, top_k=k)
    turns_TE = torch.stack([torch.tensor([4.0, 3, 2, 1, 0], dtype=torch.float64).roll(t) for t in range(30)])
    even = routed(turns_TE, 3, top_k=k)
    assert even.demand_BE.tolist() == [[2 * k] * 5] * 3
    for routing in (uniform, even):
        totals = totals_of([routing], torch.full((5,), 0.2, dtype=torch.float64))
        assert number(balance_loss(routing, form, scope, totals)) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(("form", "scope"), ALL)
def test_value_with_all_on_one_expert(form: str, scope: str) -> None:
    logits_TE = torch.zeros(12, 7, dtype=torch.float64)
    logits_TE[:, 3] = 200
    routing = routed(logits_TE, 2, top_k=1)
    totals = totals_of([routing], torch.eye(7)[3])
    assert number(balance_loss(routing, form, scope, totals)) == pytest.approx(7, abs=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_sum_over_k_is_k_times_switch(scope: str, k: int) -> None:
    torch.manual_seed(0)
    valid_T = torch.rand(24) < 0.7
    routing = routed(torch.randn(24, 5, dtype=torch.float64), 3, valid_T, top_k=k)
    totals = totals_of([routing], torch.rand(5).double())
    switch = number(balance_loss(routing, "switch", scope, totals))
    assert number(balance_loss(routing, "sum_over_k", scope, totals)) == pytest.approx(k * switch, abs=1e-12)


def test_sigmoid_scores_are_normalised_to_sum_one() -> None:
    torch.manual_seed(0)
    z_TE = torch.randn(24, 5, dtype=torch.float64)
    routing = routed(z_TE, top_k=2, score="sigmoid")
    s_TE = 1 / (1 + torch.exp(-z_TE))
    share_E = routing.assignment.counts_E / 48
    want = 5 * (share_E * (s_TE / s_TE.sum(-1, keepdim=True)).mean(0)).sum()
    torch.testing.assert_close(
        balance_loss(routing, "switch", "micro", StepTotals(24.0)), want, rtol=0, atol=1e-12
    )


def test_load_counts_the_demand_and_not_what_capacity_left() -> None:
    logits_TE = torch.randn(24, 5, dtype=torch.float64)
    logits_TE[:, 2] += 5
    full = routed(logits_TE, 2, top_k=2)
    cut = routed(logits_TE, 2, top_k=2, capacity_factor=0.5, min_capacity=0)
    assert int(cut.assignment.counts_E.sum()) < int(full.assignment.counts_E.sum())
    for form, scope in ALL:
        totals = totals_of([full], torch.rand(5).double())
        assert torch.equal(balance_loss(cut, form, scope, totals), balance_loss(full, form, scope, totals))


def test_z_loss_value_gradient_and_shift() -> None:
    torch.manual_seed(0)
    z_TE = 3 * torch.randn(23, 5, dtype=torch.float64, requires_grad=True)
    z_TE.retain_grad()
    routing = routed(z_TE)
    loss = z_loss(routing, StepTotals(23.0))
    loss.backward()
    lse_T = torch.log(torch.exp(z_TE.detach()).sum(-1))
    assert number(loss) == pytest.approx(float((lse_T**2).mean()), abs=1e-12)
    analytic_TE = 2 / 23 * lse_T[:, None] * z_TE.detach().softmax(-1)
    torch.testing.assert_close(z_TE.grad, analytic_TE, rtol=0, atol=1e-12)
    shift_T1 = torch.randn(23, 1, dtype=torch.float64)
    shifted = routed(z_TE.detach() + shift_T1)
    assert torch.equal(shifted.assignment.token_ids_N, routing.assignment.token_ids_N)
    torch.testing.assert_close(
        shifted.assignment.weights_N, routing.assignment.weights_N.detach(), rtol=0, atol=1e-12
    )
    want = ((lse_T + shift_T1[:, 0]) ** 2).mean()
    torch.testing.assert_close(z_loss(shifted, StepTotals(23.0)), want, rtol=0, atol=1e-12)
    assert abs(float(want) - number(loss)) > 1e-3


@pytest.mark.parametrize(("form", "scope"), [*ALL, ("z", "micro")])
def test_padding_counts_for_nothing(form: str, scope: str) -> None:
    """The padded run's loss and router gradient are those of the sequences cut to their lengths."""
    torch.manual_seed(0)
    layer = MoELayer(3, 5, 7, router_options={"top_k": 2}).double()
    x_BSD, lengths = torch.randn(4, 6, 3, dtype=torch.float64), [6, 1, 0, 4]
    valid_BS = torch.arange(6) < torch.tensor(lengths)[:, None]
    running_E = torch.rand(7).double()

    def loss_and_grad(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
        contexts = [replace(RouterContext.default(*x.shape[:2]), valid_T=valid) for x, valid in parts]
        routings = [layer(x, ctx)[1] for (x, _), ctx in zip(parts, contexts, strict=True)]
        totals = totals_of(routings, running_E)
        terms = [z_loss(r, totals) if form == "z" else balance_loss(r, form, scope, totals) for r in routings]
        loss = torch.stack(terms).sum()
        return loss.detach(), torch.autograd.grad(loss, layer.router.weight_ED)[0]

    padded = loss_and_grad([(x_BSD, valid_BS.view(-1))])
    if scope == "sequence":
        cut = loss_and_grad([(x_BSD[b : b + 1, :n], None) for b, n in enumerate(lengths)])
    else:
        cut = loss_and_grad([(x_BSD[valid_BS][None], None)])
    torch.testing.assert_close(padded, cut, rtol=0, atol=1e-12)
    assert padded[1].abs().max() > 1e-4


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@pytest.mark.parametrize(("form", "scope"), ALL)
def test_a_micro_batch_without_tokens_adds_nothing(form: str, scope: str, shape: tuple[int, int]) -> None:
    layer = MoELayer(3, 5, 7)
    empty, other = layer(torch.randn(*shape, 3))[1], layer(torch.randn(2, 3, 3))[1]
    totals = totals_of([empty, other], torch.full((7,), 1 / 7))
    loss = balance_loss(empty, form, scope, totals) + z_loss(empty, totals)
    assert number(loss) == 0
    loss.backward()
    assert not layer.router.weight_ED.grad.any()


@pytest.mark.parametrize("scope", ["global_batch", "running"])
def test_totals_may_live_on_another_device(scope: str) -> None:
    routing = routed(torch.randn(12, 5), 2)
    totals = totals_of([routing], torch.full((5,), 0.2))
    elsewhere = tree_map_only(Tensor, lambda t: t.to("meta"), routing)
    assert balance_loss(elsewhere, "sum_over_k", scope, totals).is_meta


def test_what_is_missing_is_named() -> None:
    routing, totals = routed(torch.randn(12, 5)), StepTotals(12.0)
    with pytest.raises(ValueError, match=r"name=swich is not known; known: .* \(did you mean switch\?\)"):
        balance_loss(routing, "swich", "micro", totals)
    with pytest.raises(ValueError, match="scope=batch is not offered for switch: take micro, sequence"):
        balance_loss(routing, "switch", "batch", totals)
    with pytest.raises(ValueError, match="running scope needs running_load"):
        balance_loss(routing, "switch", "running", totals)
    for form in FORMS:
        with pytest.raises(ValueError, match="global_batch scope needs"):
            balance_loss(routing, form, "global_batch", totals)
    with pytest.raises(ValueError, match="returns no scores"):
        balance_loss(replace(routing, scores_TE=None), "switch", "micro", totals)
    with pytest.raises(ValueError, match="returns no logits"):
        z_loss(replace(routing, logits_TE=None), totals)


def test_a_running_load_starts_without_gradient() -> None:
    logits_TE = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    routing = routed(logits_TE, 2, score="sigmoid")
    totals = StepTotals(12.0, signals=RunningLoad({0: 5, 1: 5}).signals())
    loss = balance_loss(routing, "switch", "running", totals, layer=1)
    loss.backward()
    assert number(loss) == pytest.approx(1, abs=1e-7)  # the state is fp32
    assert logits_TE.grad.abs().max() < 1e-15

"""Repair as an option of routers: what it refuses, gradients, metrics, balance losses, every router.

Shapes: T tokens, D model, E experts, N assignments.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from balance_cases import balance_loss, step_totals
from moe_cases import reassigned
from repair_routers import LIMITS, RULES, SCORED, normal, of_devices, pairs_of, repaired, skewed, top_two

from moetrain.moe import MoELayer, RouterContext, Routing, build_router
from moetrain.moe.assign import apply_capacity, from_token_choice
from moetrain.moe.options import DropOrder, Repair
from moetrain.moe.repair import repair_overflow
from moetrain.train.log.metrics import RoutingStats

# what is refused


@pytest.mark.parametrize("rule", RULES)
def test_a_repair_needs_a_capacity_and_scores(rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^router\.repair={rule} has nothing .*: set router\.cap"):
        build_router("topk", d_model=3, num_experts=5, repair=rule, **of_devices(rule))
    build_router("topk", d_model=3, num_experts=5, repair=rule, eval_capacity_factor=1.0, **of_devices(rule))
    for name in ("hash", "random"):
        with pytest.raises(ValueError, match=rf"^router\.repair={rule} .*router={name} returns none: set"):
            build_router(name, d_model=3, num_experts=5, repair=rule, capacity_factor=1.0)
    ctx = RouterContext.default(1, 7)
    blind = replace(top_two(skewed(0, 7, 5), ctx), scores_TE=None)
    with pytest.raises(ValueError, match=rf"^router\.repair={rule} needs a router with scores"):
        repaired(blind, ctx, rule)


# in a router


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SCORED)
def test_every_router_with_scores(name: str, rule: str) -> None:
    """Invariants and finite gradients, in training and evaluation, with padding and with tokens of zeros."""
    ctx = replace(RouterContext.default(3, 7), valid_T=torch.arange(21) % 7 < 6, token_ids_T=torch.arange(21))
    limits = {"capacity_factor": 0.5, "eval_capacity_factor": 0.7, "min_capacity": 0}
    torch.manual_seed(0)
    router = build_router(name, d_model=4, num_experts=5, repair=rule, **limits, **of_devices(rule)).double()
    for training in (True, False):
        for x_TD in (normal(0, 21, 4), 0 * normal(0, 21, 4), 1e4 * normal(0, 21, 4)):
            routing = router.train(training)(x_TD, ctx)
            routing.check()
            if routing.assignment.weights_N.requires_grad:
                router.zero_grad()
                routing.assignment.weights_N.sum().backward()
                assert all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())


def test_evaluation_without_capacity_has_nothing_to_repair() -> None:
    options = {"capacity_factor": 0.5, "min_capacity": 0, "repair": "fill_in", "top_k": 2}
    torch.manual_seed(0)
    layer = MoELayer(3, 5, 4, router_options=options)
    x_BSD = torch.randn(2, 9, 3)
    assert layer(x_BSD)[1].repaired_E is not None
    routing = layer.eval()(x_BSD)[1]
    assert routing.repaired_E is None
    assert routing.assignment.counts_E.equal(routing.demand_E)


def test_a_layer_computes_what_was_repaired() -> None:
    """All tokens want expert 1 of three, which has a third of the places: the others compute the rest."""
    options = {"capacity_factor": 1.0, "min_capacity": 0, "top_k": 1, "repair": "next_expert"}
    layer = MoELayer(3, 5, 3, router_options=options).double()
    with torch.no_grad():
        layer.router.weight_ED.copy_(torch.tensor([[1.0] * 3, [2.0] * 3, [0.0] * 3]))
    x_BSD = normal(1, 1, 9, 3).abs() + 0.1
    y_BSD, routing = layer(x_BSD)
    assert routing.assignment.token_ids_N.tolist() == [3, 4, 5, 0, 1, 2, 6, 7, 8]
    assert routing.demand_E.tolist() == [0, 9, 0]
    assert routing.repaired_E.tolist() == [3, 0, 3]
    assert y_BSD.any(-1).all()


def test_the_group_bounds_the_repair() -> None:
    """Places that one sequence leaves free are no other's, unless they share a routing group."""
    logits_TE = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 2 + [[1.0, 0.0]] * 2, dtype=torch.float64)
    ctx, scores_TE = RouterContext.default(2, 4), logits_TE.softmax(-1)
    ids_TK = logits_TE.topk(1).indices
    wanted = from_token_choice(ids_TK, torch.ones(8, 1), ctx, 2, scores_TE)
    for group, want in (("sequence", [[0, 1, 6, 7], [2, 3, 4, 5]]), ("2", [[0, 1, 2, 3], [4, 5, 6, 7]])):
        limits = (1.0, 0, DropOrder.position, group)
        kept = apply_capacity(wanted, ctx, *limits)
        found = repair_overflow(wanted, kept, ctx, Repair.next_expert, *limits)
        assert found.assignment.token_ids_N.view(2, 4).tolist() == want


# gradients


def test_gradients_of_moved_weights() -> None:
    ctx = RouterContext.default(2, 7)
    logits_TE = skewed(3, 14, 5).requires_grad_()
    found = repaired(top_two(logits_TE, ctx), ctx, "next_expert")
    assert int(found.repaired_E.sum()) >= 3
    assert torch.autograd.gradcheck(
        lambda z: repaired(top_two(z, ctx), ctx, "next_expert").assignment.weights_N, logits_TE
    )


@pytest.mark.parametrize("rule", ["local", "fill_in", "local_fill_in"])
def test_the_normaliser_is_a_constant_backward(rule: str) -> None:
    """Weights are n s / sg(sum n s): forward they sum to 1, backward each follows its own score alone."""
    ctx, tokens = RouterContext.default(2, 7), 14
    logits_TE = skewed(3, tokens, 5).requires_grad_()
    wanted = top_two(logits_TE, ctx)
    kept = pairs_of(apply_capacity(wanted, ctx, *LIMITS))
    found = repaired(wanted, ctx, rule)
    added = pairs_of(found) - kept
    assert int(found.repaired_E.sum()) == len(added) >= 3
    kept_by = [[e for token, e in sorted(kept) if token == t] for t in range(tokens)]
    assert {len(row) for row in kept_by} == {0, 1, 2}
    weights, changed = [], set()
    for t, e in zip(
        found.assignment.token_ids_N.tolist(), found.assignment.expert_ids_N().tolist(), strict=True
    ):
        s_E, row = logits_TE[t].softmax(-1), kept_by[t]
        best = int(s_E.argmax())  # of all experts, which are all local here
        number = dict.fromkeys([*row, *(expert for token, expert in added if token == t)], 1)
        if rule != "fill_in" and len(row) < 2:
            number[best] = (best in row) + 2 - len(row)
        if number == dict.fromkeys(row, 1):  # as top_two made them
            weights.append(s_E[e] / s_E[logits_TE[t].topk(2).indices].sum())
            continue
        changed.add(t)
        weights.append(number[e] * s_E[e] / sum(n * s_E[j] for j, n in number.items()).detach())
    torch.testing.assert_close(found.assignment.weights_N, torch.stack(weights))
    total_T = torch.zeros(14, dtype=torch.float64).index_add(
        0, found.assignment.token_ids_N, found.assignment.weights_N
    )
    torch.testing.assert_close(total_T[sorted(changed)], torch.ones(len(changed), dtype=torch.float64))
    out_N = normal(4, len(weights))
    (got,) = torch.autograd.grad((found.assignment.weights_N * out_N).sum(), logits_TE, retain_graph=True)
    (want,) = torch.autograd.grad((torch.stack(weights) * out_N).sum(), logits_TE)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_score_that_hardly_is_one_has_a_finite_gradient(rule: str) -> None:
    """Of a token that loses nothing, and of one that does."""
    ctx = RouterContext.default(1, 5)
    scores_TE = torch.tensor([[1e-310, 1.0, 0.0]] * 5, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.ones(5, 1, dtype=torch.float64)
    wanted = from_token_choice(torch.zeros(5, 1).long(), weights_TK, ctx, 3, scores_TE)
    found = repaired(wanted, ctx, rule)
    assert len(found.assignment.token_ids_N) > 1
    (slope_TE,) = torch.autograd.grad(found.assignment.weights_N.sum(), scores_TE, allow_unused=True)
    assert slope_TE is None or slope_TE.isfinite().all()
    assert found.assignment.weights_N.isfinite().all()


# ranks, forward scales, balance, metrics


@pytest.mark.parametrize("rule", RULES)
def test_ranks_and_forward_scales_follow(rule: str) -> None:
    """An added assignment has those of the one it replaces; in fill_in the next rank, the weakest's scale."""
    ctx = RouterContext.default(2, 7)
    wanted = top_two(skewed(3, 14, 5), ctx)
    scale_N = torch.arange(28.0, dtype=torch.float64)
    wanted = reassigned(wanted, forward_scale_N=scale_N)
    kept, found = apply_capacity(wanted, ctx, *LIMITS), repaired(wanted, ctx, rule)
    found.check()

    def rows(r: Routing) -> list[set[tuple[int, float]]]:
        """(rank, scale) of each token's assignments."""
        found: list[set[tuple[int, float]]] = [set() for _ in range(14)]
        for t, *both in zip(
            r.assignment.token_ids_N.tolist(),
            r.assignment.choice_N.tolist(),
            r.assignment.forward_scale_N.tolist(),
            strict=True,
        ):
            found[t].add((both[0], both[1]))
        return found

    changed = 0
    for before, left, after in zip(rows(wanted), rows(kept), rows(found), strict=True):
        added = after - left
        changed += len(added)
        if rule == "fill_in":
            weakest = dict(before)[1]
            assert added <= {(2, weakest)}
        elif rule == "next_expert":
            assert added <= before - left
        elif rule == "local_fill_in":
            assert added <= {(2, dict(before)[1]), min(before - left, default=(9, 9.0))}
        else:  # one for all that were lost, unless another took them up
            assert len(added) <= 1
            assert added <= {min(before - left, default=(9, 9.0))}
    assert changed == int(found.repaired_E.sum()) > 2


@pytest.mark.parametrize("rule", RULES)
def test_balance_losses_see_the_routers_own_wish(rule: str) -> None:
    ctx = RouterContext.default(2, 7)
    wanted = top_two(skewed(3, 14, 5), ctx)
    found, totals = repaired(wanted, ctx, rule), step_totals(14.0, {0: wanted.demand_E})
    for form in ("switch", "gshard_first", "sum_over_k"):
        for scope in ("micro", "sequence"):
            one, other = (balance_loss(r, form, scope, totals) for r in (wanted, found))
            assert torch.equal(one, other)


@pytest.mark.parametrize("rule", RULES)
def test_the_drop_rate_is_what_capacity_refused(rule: str) -> None:
    """Repaired or not; loads and experts per token are of what is computed, which fill_in may raise."""
    ctx = RouterContext.default(2, 7)
    wanted = top_two(skewed(3, 14, 5), ctx)
    kept, found = apply_capacity(wanted, ctx, *LIMITS), repaired(wanted, ctx, rule)
    stats = RoutingStats()
    stats.add({0: found})
    row = stats.reduce().metrics()
    lost = 28 - len(kept.assignment.token_ids_N)
    assert lost > 0
    assert row["moe/0/drop_rate"] == pytest.approx(lost / 28)
    assert row["moe/0/experts_per_token"] == pytest.approx(len(found.assignment.token_ids_N) / 14)
    assert len(found.assignment.token_ids_N) > len(kept.assignment.token_ids_N)


def test_broken_repairs_are_named() -> None:
    ctx = RouterContext.default(2, 7)
    found = repaired(top_two(skewed(3, 14, 5), ctx), ctx, "next_expert")
    with pytest.raises(ValueError, match="more assignments than its demand"):
        replace(found, demand_BE=0 * found.demand_BE).check()
    with pytest.raises(ValueError, match="fewer repaired assignments than 0"):
        replace(found, repaired_E=-found.repaired_E, demand_BE=found.demand_BE + 9).check()
    with pytest.raises(ValueError, match="fewer repaired assignments than 0, or more"):
        replace(found, repaired_E=found.assignment.counts_E + 1).check()


def test_a_tokens_first_choice_takes_its_best_next() -> None:
    """The last token loses both: its first choice goes to expert 2, and 3 is taken before its second."""
    ctx = RouterContext.default(1, 3)
    scores_TE = torch.tensor([[0.1, 0.9, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0], [0.3, 0.4, 0.2, 0.1]]).double()
    ids_TK = scores_TE.topk(2).indices
    wanted = from_token_choice(ids_TK, scores_TE.gather(1, ids_TK), ctx, 4, scores_TE)
    limits = (0.6, 0, DropOrder.choice, "sequence")  # one place an expert
    kept = apply_capacity(wanted, ctx, *limits)
    found = repair_overflow(wanted, kept, ctx, Repair.next_expert, *limits)
    mine_N = found.assignment.token_ids_N == 2
    ranks = dict(
        zip(
            found.assignment.expert_ids_N()[mine_N].tolist(),
            found.assignment.choice_N[mine_N].tolist(),
            strict=True,
        )
    )
    assert ranks == {2: 0}

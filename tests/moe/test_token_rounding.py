"""Token rounding: against a loop over experts and tokens, and by what it promises.

Shapes: T tokens, E experts, N assignments.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from moetrain.moe import MoELayer, RouterContext, Routing, build_router
from moetrain.moe.assign import from_mask, from_token_choice
from moetrain.moe.options import Rounding
from moetrain.moe.token_rounding import round_tokens
from moetrain.moe.topk_ops import softmax, top_ids

seeds = pytest.mark.parametrize("seed", range(160))
Found = dict[tuple[int, int], Tensor]  # (expert, token) -> weight


@dataclass(frozen=True)
class Case:
    """A routing of ``wanted``, made of ``logits_TE``; ``total``: what a token's weights sum to, or None."""

    logits_TE: Tensor
    wanted: Routing
    ctx: RouterContext
    rule: Rounding
    tile: int
    per_group: int
    total: float | None

    def rounded(self) -> Routing:
        group = "sequence" if self.per_group == 1 else str(self.per_group)
        found = round_tokens(self.wanted, self.ctx, self.rule, self.tile, group, self.total)
        found.check()
        assert torch.equal(found.demand_BE, self.wanted.demand_BE)
        return found

    def groups(self) -> list[range]:
        size = self.per_group * self.ctx.seq
        return [range(first, first + size) for first in range(0, len(self.logits_TE), max(size, 1))]


def case_of(seed: int) -> Case:
    """A random case; one in ten has no token."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    per_group, num_groups = pick.choice([1, 1, 2]), pick.choice([0, 1, 1, 2, 3])
    seq, num_experts = pick.choice([0, 1, 2, 5, 13, 17, 23]), pick.choice([1, 2, 3, 5, 7])
    batch, k = per_group * num_groups, pick.randint(1, num_experts)
    logits_TE = torch.randn(batch * seq, num_experts, generator=generator, dtype=torch.float64)
    logits_TE = logits_TE - pick.choice([0, 3]) * torch.arange(num_experts) / num_experts  # skew
    logits_TE = pick.choice([logits_TE, logits_TE, logits_TE.round(), 0 * logits_TE]).requires_grad_()
    valid_T = pick.choice([None, torch.rand(batch * seq, generator=generator) < 0.7])
    ctx = replace(RouterContext.default(batch, seq), valid_T=valid_T)
    kind, rule = pick.choice(["sum to 1", "plain", "mask"]), pick.choice(list(Rounding)[1:])
    total = 1.0 if kind == "sum to 1" else None
    wanted = routed(logits_TE, ctx, k, kind)
    return Case(logits_TE, wanted, ctx, rule, pick.choice([1, 2, 3, 4, 7]), per_group, total)


def routed(logits_TE: Tensor, ctx: RouterContext, k: int, kind: str) -> Routing:
    """Top-k with weights that sum to 1, or as they are; or any number of experts a token, none included."""
    scores_TE = softmax(logits_TE)
    if kind == "mask":
        return from_mask(logits_TE.detach() > -0.5, scores_TE, ctx, scores_TE, logits_TE)
    ids_TK = top_ids(scores_TE.detach(), k)
    weights_TK = scores_TE.gather(1, ids_TK)
    if kind == "sum to 1":
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    return from_token_choice(ids_TK, weights_TK, ctx, scores_TE.shape[1], scores_TE, logits_TE)


def weights(routing: Routing) -> Found:
    experts, tokens = routing.assignment.expert_ids_N().tolist(), routing.assignment.token_ids_N.tolist()
    return dict(zip(zip(experts, tokens, strict=True), routing.assignment.weights_N, strict=True))


# the rule once more, expert by expert and token by token


def multiple(number: int, case: Case) -> int:
    below, above = number // case.tile * case.tile, -(-number // case.tile) * case.tile
    if case.rule is Rounding.up:
        return above
    if case.rule is Rounding.down or number - below < above - number:
        return below
    if number - below > above - number:
        return above
    return below if below // case.tile % 2 == 0 else above


def by_hand(case: Case) -> Found:
    assert case.wanted.scores_TE is not None
    before, score = weights(case.wanted), case.wanted.scores_TE.tolist()
    chose: dict[int, list[int]] = defaultdict(list)
    for e, t in before:
        chose[t].append(e)
    after: Found = {}
    for group in case.groups():
        for e in range(case.wanted.num_experts):
            wants = sorted((t for t in group if (e, t) in before), key=lambda t: (-score[t][e], t))
            others = [t for t in group if (e, t) not in before and chose[t]]
            others.sort(key=lambda t: (-score[t][e], t))
            for t in (wants + others)[: multiple(len(wants), case)]:
                if (e, t) in before:
                    after[e, t] = before[e, t]
                    continue
                best = min(chose[t], key=lambda other: (-score[t][other], other))
                scores_E = case.wanted.scores_TE[t]
                after[e, t] = before[best, t] * scores_E[e] / scores_E[best]
    if case.total is not None:
        for t in chose:
            mine = [pair for pair in after if pair[1] == t]
            if mine and {e for e, _ in mine} != set(chose[t]):
                total = torch.stack([after[pair] for pair in mine]).sum()
                after |= {pair: after[pair] / total * case.total for pair in mine}
    return after


@seeds
def test_it_is_the_rule_with_its_gradient(seed: int) -> None:
    case = case_of(seed)
    found, right = weights(case.rounded()), by_hand(case)
    assert found.keys() == right.keys()
    if not found:
        return
    ours, theirs = (torch.stack([side[pair] for pair in sorted(right)]) for side in (found, right))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    cotangent = torch.linspace(-1, 2, len(ours), dtype=torch.float64)
    grads = [
        torch.autograd.grad((side * cotangent).sum(), case.logits_TE, retain_graph=True)
        for side in (ours, theirs)
    ]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@seeds
def test_counts_are_multiples_and_change_by_less_than_a_tile(seed: int) -> None:
    case = case_of(seed)
    before, after = weights(case.wanted).keys(), weights(case.rounded()).keys()
    choosing = {t for _, t in before}
    for group in case.groups():
        for e in range(case.wanted.num_experts):
            was, now = ({t for t in group if (e, t) in pairs} for pairs in (before, after))
            assert len(now) % case.tile == 0 or now == choosing & set(group)
            assert was <= now or now <= was, "a token that chose never makes room for one that did not"
            changed = abs(len(now) - len(was))
            assert 2 * changed <= case.tile if case.rule is Rounding.nearest else changed < case.tile
            assert len(now) >= len(was) or case.rule is not Rounding.up
            assert len(now) <= len(was) or case.rule is not Rounding.down


@seeds
def test_a_tile_of_one_changes_nothing(seed: int) -> None:
    case = case_of(seed)
    found = replace(case, tile=1).rounded()
    for field in ("token_ids_N", "weights_N", "counts_E", "choice_N"):
        one, other = (getattr(r.assignment, field) for r in (found, case.wanted))
        assert one is other is None or torch.equal(one, other), field


def test_what_is_added_has_the_ranks_after_what_was_chosen() -> None:
    torch.manual_seed(0)
    router = build_router("topk", d_model=7, num_experts=5, top_k=2, rounding="up", rounding_tile=4)
    found = router(torch.randn(17, 7), RouterContext.default(1, 17)).assignment
    for t in range(17):
        ranks = sorted(found.choice_N[found.token_ids_N == t].tolist())
        assert ranks == list(range(len(ranks)))


def test_sequences_are_rounded_each_by_itself() -> None:
    """However they are spread over micro-batches and ranks."""
    torch.manual_seed(0)
    router = build_router("sigmoid", d_model=7, num_experts=5, top_k=2, rounding="nearest", rounding_tile=4)
    router, x_TD, ctx = router.double(), torch.randn(51, 7).double(), RouterContext.default(3, 17)
    whole = weights(router(x_TD, ctx))
    for b in range(3):
        alone = weights(
            router(x_TD[17 * b : 17 * b + 17], replace(ctx, batch=1, sample_ids_B=torch.tensor([b])))
        )
        mine = {(e, t - 17 * b): w for (e, t), w in whole.items() if t // 17 == b}
        assert alone.keys() == mine.keys()
        assert all(float(alone[pair]) == pytest.approx(float(mine[pair]), rel=1e-12) for pair in mine)


def test_scores_that_underflow_keep_the_weight() -> None:
    """The one token of expert 1 is joined by the other, whose scores give nothing to divide by."""
    scores_TE = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    ctx = RouterContext.default(1, 2)
    wanted = from_token_choice(torch.tensor([[0], [1]]), torch.ones(2, 1), ctx, 2, scores_TE)
    found = round_tokens(wanted, ctx, Rounding.up, 2, "sequence", 1.0)
    assert {pair: float(w) for pair, w in weights(found).items()} == {
        (0, 0): 1.0, (0, 1): 0.0, (1, 0): 0.0, (1, 1): 1.0,
    }  # fmt: skip


def test_a_router_rounds_in_training_not_in_evaluation() -> None:
    torch.manual_seed(0)
    router = build_router("topk", d_model=7, num_experts=5, top_k=2, rounding="nearest", rounding_tile=4)
    x_TD, ctx = torch.randn(34, 7), RouterContext.default(2, 17)
    rounded, plain = (router.train(training)(x_TD, ctx) for training in (True, False))
    assert not (rounded.assignment.counts_E % 4).any()
    assert (plain.assignment.counts_E % 4).any()
    assert torch.equal(rounded.demand_BE, plain.demand_BE)
    sums_T = torch.zeros(34).index_add(0, rounded.assignment.token_ids_N, rounded.assignment.weights_N)
    torch.testing.assert_close(sums_T[sums_T > 0], torch.ones(int((sums_T > 0).sum())))


def test_weights_as_they_are_stay_scores() -> None:
    torch.manual_seed(0)
    router = build_router("switch", d_model=7, num_experts=3, rounding="up", rounding_tile=5)
    a, scores_TE = (r := router(torch.randn(34, 7), RouterContext.default(2, 17))).assignment, r.scores_TE
    assert int(r.repaired_E.sum()) > 0
    torch.testing.assert_close(a.weights_N, scores_TE[a.token_ids_N, a.expert_ids_N()])


def test_experts_without_a_network_keep_their_tokens() -> None:
    torch.manual_seed(0)
    router = build_router("moepp", d_model=7, num_experts=3, top_k=2, rounding="up", rounding_tile=5)
    x_TD, ctx = torch.randn(17, 7), RouterContext.default(1, 17)
    found, plain = (router.train(training)(x_TD, ctx).assignment for training in (True, False))
    assert torch.equal(found.counts_E[3:], plain.counts_E[3:])
    assert not (found.counts_E[:3] % 5).any()


def test_no_row_of_a_layer_is_padding() -> None:
    torch.manual_seed(0)
    layer = MoELayer(7, 5, 3, "topk", {"rounding": "nearest", "rounding_tile": 8}, block=8, backend="loop")
    x_BSD = torch.randn(2, 31, 7)
    work = layer.dispatcher.dispatch(
        x_BSD.view(-1, 7), layer.router(x_BSD.view(-1, 7), RouterContext.default(2, 31)).assignment
    )
    (rows,) = work.arrivals()
    assert rows.rows.segments.aligned == rows.rows.segments.useful
    layer(x_BSD)[0].sum().backward()


def test_without_scores_it_is_refused() -> None:
    ctx = RouterContext.default(1, 2)
    wanted = from_token_choice(torch.zeros(2, 1).long(), torch.ones(2, 1), ctx, 2)
    with pytest.raises(ValueError, match=r"router.rounding=up needs a router with scores"):
        round_tokens(wanted, ctx, Rounding.up, 2, "sequence", None)

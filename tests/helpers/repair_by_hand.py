"""Repair of capacity overflow by loops over tokens, and the cases that it is tried on.

Shapes: T tokens, E experts, N assignments, G routing groups.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from moetrain.moe import RouterContext, Routing
from moetrain.moe.assign import _DROP_SALT, apply_capacity, from_mask, from_token_choice
from moetrain.moe.options import DropOrder, Repair
from moetrain.moe.repair import repair_overflow
from moetrain.moe.topk_ops import softmax, top_ids


@dataclass(frozen=True)
class Case:
    """A routing of ``wanted``, its capacity in tenths, and everything that decides who stays."""

    wanted: Routing
    ctx: RouterContext
    tenths: int
    minimum: int
    order: DropOrder
    per_group: int

    @property
    def limits(self) -> tuple[float, int, DropOrder, str]:
        group = "sequence" if self.per_group == 1 else str(self.per_group)
        return self.tenths / 10, self.minimum, self.order, group

    def kept(self) -> Routing:
        return apply_capacity(self.wanted, self.ctx, *self.limits)

    def repaired(self, rule: str, local: Tensor | None = None) -> Routing:
        if local is None and Repair[rule].is_local:
            local = torch.ones_like(self.wanted.scores_TE, dtype=torch.bool)
        found = repair_overflow(self.wanted, self.kept(), self.ctx, Repair[rule], *self.limits, local)
        found.check()
        assert torch.equal(found.demand_BE, self.wanted.demand_BE)
        return found

    def group(self, token: int) -> int:
        return token // (self.per_group * self.ctx.seq)

    def capacity(self, group: int) -> int:
        demand = sum(self.group(t) == group for t in self.wanted.assignment.token_ids_N.tolist())
        return max(self.minimum, -(-self.tenths * demand // (10 * self.wanted.num_experts)))


@st.composite
def cases(draw: st.DrawFn, orders: tuple[str, ...] = tuple(o.name for o in DropOrder)) -> Case:
    per_group, num_groups = draw(st.sampled_from([1, 1, 2])), draw(st.integers(0, 3))
    seq, num_experts = draw(st.sampled_from([0, 1, 2, 5, 13])), draw(st.sampled_from([1, 2, 3, 5, 7]))
    batch, k = per_group * num_groups, draw(st.integers(1, num_experts))
    seed, kind = draw(st.integers(0, 999)), draw(st.sampled_from(["random", "ties", "equal", "far"]))
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(batch * seq, num_experts, generator=generator, dtype=torch.float64)
    logits_TE = logits_TE - 2 * torch.arange(num_experts) / num_experts
    logits_TE = {
        "random": logits_TE, "ties": logits_TE.round(), "equal": 0 * logits_TE, "far": 500 * logits_TE,
    }[kind]  # fmt: skip
    valid_T = torch.rand(batch * seq, generator=generator) < 0.7 if draw(st.booleans()) else None
    ctx = replace(RouterContext.default(batch, seq), valid_T=valid_T, seed=seed)
    return Case(
        routed(logits_TE, ctx, k, draw(st.sampled_from(["softmax", "plain", "mask"]))),
        ctx,
        draw(st.integers(1, 20)),
        draw(st.integers(0, 2)),
        DropOrder[draw(st.sampled_from(orders))],
        per_group,
    )


def routed(logits_TE: Tensor, ctx: RouterContext, k: int, weights: str) -> Routing:
    """Top-k with weights that sum to 1, or as they are; or any number of experts a token, none included."""
    scores_TE = softmax(logits_TE)
    if weights == "mask":
        return from_mask(logits_TE > -0.5, scores_TE, ctx, scores_TE, logits_TE)
    ids_TK = top_ids(scores_TE.detach(), k)
    weights_TK = scores_TE.gather(1, ids_TK)
    if weights == "softmax":
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    return from_token_choice(ids_TK, weights_TK, ctx, scores_TE.shape[1], scores_TE, logits_TE)


def pairs(routing: Routing) -> dict[tuple[int, int], float]:
    """(expert, token) -> weight."""
    keys = zip(
        routing.assignment.expert_ids_N().tolist(), routing.assignment.token_ids_N.tolist(), strict=True
    )
    return dict(zip(keys, routing.assignment.weights_N.tolist(), strict=True))


def by_token(routing: Routing) -> dict[int, dict[int, float]]:
    rows: dict[int, dict[int, float]] = defaultdict(dict)
    for (e, t), weight in pairs(routing).items():
        rows[t][e] = weight
    return rows


def loads(case: Case, routing: Routing) -> dict[tuple[int, int], int]:
    found: dict[tuple[int, int], int] = defaultdict(int)
    for e, t in pairs(routing):
        found[e, case.group(t)] += 1
    return found


# the rules once more, token by token


def others(case: Case, token: int) -> list[int]:
    """The experts that a token did not want, best first."""
    row = case.wanted.scores_TE[token].tolist()
    wanted = by_token(case.wanted)[token]
    return sorted((e for e in range(len(row)) if e not in wanted), key=lambda e: (-row[e], e))


def priorities(case: Case) -> dict[tuple[int, int], float]:
    """The larger goes first."""
    wanted, before = case.wanted, pairs(case.wanted)
    if case.order is DropOrder.probability:
        return before
    if case.order is DropOrder.batch_prioritized:
        return {(e, t): max(wanted.scores_TE[t].tolist()) for e, t in before}
    if case.order is DropOrder.random:
        noise_TE = case.ctx.uniform((case.ctx.batch * case.ctx.seq, wanted.num_experts), _DROP_SALT)
        return {(e, t): float(noise_TE[t, e]) for e, t in before}
    if case.order is DropOrder.choice and wanted.assignment.choice_N is not None:
        return dict(zip(before, [-c for c in wanted.assignment.choice_N.tolist()], strict=True))
    return dict.fromkeys(before, 0.0)


def moved(case: Case, weight: float, token: int, old: int, new: int) -> float:
    row = case.wanted.scores_TE[token].tolist()
    return weight * row[new] / row[old] if row[old] > 1e-150 else weight


def next_expert_by_hand(case: Case) -> dict[tuple[int, int], float]:
    before, found = pairs(case.wanted), pairs(case.kept())
    first, room = priorities(case), loads(case, case.kept())
    lost: dict[int, list[int]] = defaultdict(list)
    for e, t in sorted(before.keys() - found.keys(), key=lambda p: (-first[p], p)):
        lost[t].append(e)
    for choice in range(case.wanted.num_experts):
        asked: dict[int, list[int]] = defaultdict(list)
        for t in sorted(lost):
            if lost[t] and choice < len(others(case, t)):
                asked[others(case, t)[choice]].append(t)
        for e, tokens in asked.items():
            for t in sorted(tokens, key=lambda t: (-first[lost[t][0], t], t)):
                if room[e, case.group(t)] < case.capacity(case.group(t)):
                    room[e, case.group(t)] += 1
                    old = lost[t].pop(0)
                    found[e, t] = moved(case, before[old, t], t, old, e)
    return found


def rectified_by_hand(case: Case, local_TE: Tensor | None, fills: bool) -> dict[tuple[int, int], float]:
    """``local`` and ``fill_in``: who stands for how many choices, then each changed token's weights."""
    wanted, kept = by_token(case.wanted), by_token(case.kept())
    number = {t: dict.fromkeys(kept[t], 1) for t in wanted}
    changed = set()
    for t, row in wanted.items() if local_TE is not None else ():
        lost, near = len(row) - len(kept[t]), local_TE[t].nonzero().flatten().tolist()
        if lost and near:
            best = min(near, key=lambda e, t=t: (-float(case.wanted.scores_TE[t, e]), e))
            number[t][best] = number[t].get(best, 0) + lost
            changed.add(t)
    room = loads(case, case.kept())
    for e in range(case.wanted.num_experts) if fills else ():
        asking = [t for t, row in wanted.items() if row and others(case, t)[:1] == [e] and e not in number[t]]
        for t in sorted(asking, key=lambda t, e=e: (-float(case.wanted.scores_TE[t, e]), t)):
            if room[e, case.group(t)] < case.capacity(case.group(t)):
                room[e, case.group(t)] += 1
                number[t][e] = 1
                changed.add(t)
    found = pairs(case.kept())
    for t in changed:
        parts = {e: n * float(case.wanted.scores_TE[t, e]) for e, n in number[t].items()}
        if not sum(parts.values()) > 1e-150:
            parts = {e: float(n) for e, n in number[t].items()}
        found |= {(e, t): sum(wanted[t].values()) * p / sum(parts.values()) for e, p in parts.items()}
    return found


def some_local(case: Case, seed: int) -> Tensor:
    """[T, E]: any experts, none or all of a token's among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(case.wanted.scores_TE.shape, generator=generator) < (0.4, 0.4, 2.0)[seed % 3]

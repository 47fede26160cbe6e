"""Repair of capacity overflow: a transform of a Routing that assigns refused assignments anew.

Shapes: T tokens, E experts, N wanted assignments, L lost ones (over capacity), M kept ones, A added ones,
X the tokens concerned, G routing groups, Q = E G queues, one of each expert and group.

Every rule ranks experts by ``scores_TE``, ties to the lower expert. What it adds is counted in ``repaired_E``
and not in ``demand_BE``: balance losses and controllers still get the demand of the router itself.

Sources: next choices as in Lepikhin et al. 2020 (GShard's overflow), taken further; ``local`` and ``fill_in``
are Rectify-Router's intra-GPU and fill-in rectification (Zeng et al. 2024, arXiv:2402.12399).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.moe.assign import count, drop_priority, group_capacity, group_ids, rank_within
from moetrain.moe.context import RouterContext
from moetrain.moe.options import DropOrder, Repair
from moetrain.moe.pairs import Pairs, least_divisor
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import first_max, top_ids


def repair_overflow(
    wanted: Routing,
    kept: Routing,
    ctx: RouterContext,
    rule: Repair,
    factor: float,
    minimum: int,
    order: DropOrder,
    group: str,
    local_TE: Tensor | None = None,
    *,
    of_tokens: bool = False,
) -> Routing:
    """``kept`` = ``apply_capacity`` of ``wanted`` with the same arguments, repaired by ``rule``.

    ``next_expert``: in rounds. In round r each token with a lost assignment asks the r-th best of the experts
    that it did not want, with the first of its lost ones by ``order``; an expert grants its free places by
    ``order`` too, ties to the earlier token, and what it refuses is refused for good. The weight is
    w_old score_new / score_old, differentiable in all three (w_old alone where score_old is below the root of
    the smallest normal number).

    ``local``: a token that lost m of its assignments gives them all to its best local expert h, which
    capacity does not bind. ``local_TE`` marks the experts of each token's own device (``local_experts.py``);
    a token without any stays as it is.

    ``fill_in``: each token asks for the best expert that it did not want; an expert's free places go to the
    highest scores, ties to the earlier token.

    ``local_fill_in``: both. What ``local`` sends to an expert takes none of its free places, and a token that
    is sent to its next choice already does not ask for it.

    The last three share a changed token's weights anew: with n_j = 1 for what it kept and for its place in
    ``fill_in``, plus m for h, they become W n_j s_j / sum_i n_i s_i, where W is the weight that it had in all
    before capacity: the paper's form where scores are a softmax and W is 1. W and the sum are constants in
    the backward pass (straight-through); where all these scores underflow, every choice weighs the same.

    An added assignment has the choice rank and the forward scale of the one that it replaces; in ``fill_in``
    the rank after the last, and the scale of the weakest. Raises ValueError where there are no scores, or no
    ``local_TE`` for a rule that needs it.
    """
    if wanted.scores_TE is None:
        raise ValueError(f"router.repair={rule.name} needs a router with scores: set router.repair=none")
    if rule is Repair.none:
        return kept
    if rule.is_local and local_TE is None:
        raise ValueError(f"router.repair={rule.name} needs to know each token's local experts")
    pairs = Pairs.of(wanted, kept, wanted.scores_TE)
    capacity_EG = group_capacity(wanted, ctx, factor, minimum, group, of_tokens)
    groups = capacity_EG.shape[1]
    group_T = group_ids(torch.arange(len(wanted.scores_TE), device=capacity_EG.device), ctx, groups)
    queue_M = kept.assignment.expert_ids_N() * groups + group_T[kept.assignment.token_ids_N]
    used_Q = count(queue_M, wanted.num_experts * groups)
    free_Q = capacity_EG.view(-1) - used_Q
    if rule is not Repair.next_expert:
        own_TE = local_TE if rule.is_local else None
        return _rectified(pairs, own_TE, free_Q if rule.fills_in else None, group_T)
    priority_N = drop_priority(wanted, ctx, pairs.experts_N, order)
    if priority_N is None:  # the order of position: between experts too, the earlier token goes first
        priority_N = torch.zeros_like(pairs.experts_N)
    return _next_expert(pairs, free_Q, group_T, priority_N)


def _next_expert(pairs: Pairs, free_Q: Tensor, group_T: Tensor, priority_N: Tensor) -> Routing:
    num_experts = pairs.scores_TE.shape[1]
    groups = len(free_Q) // num_experts
    # each token's lost assignments, one after the other by priority: head_X is the one that asks
    tokens_N = pairs.wanted.assignment.token_ids_N
    lost_L = pairs.lost_L[torch.argsort(priority_N[pairs.lost_L], descending=True, stable=True)]
    lost_L = lost_L[torch.argsort(tokens_N[lost_L], stable=True)]
    tokens_X, number_X = torch.unique_consecutive(tokens_N[lost_L], return_counts=True)
    end_X = number_X.cumsum(0)
    head_X = end_X - number_X
    wanted_XE = pairs.index_TE[tokens_X] >= 0
    ranked_XE = top_ids(pairs.scores_TE[tokens_X].detach().masked_fill(wanted_XE, -torch.inf), num_experts)
    others_X = num_experts - wanted_XE.sum(1)
    found = [lost_L.new_zeros(2, 0)]
    for choice in range(num_experts - 1):
        asking_X = ((head_X < end_X) & (choice < others_X)).nonzero().squeeze(1)
        if not len(asking_X):
            break
        from_A, experts_A = lost_L[head_X[asking_X]], ranked_XE[asking_X, choice]
        queue_A = experts_A * groups + group_T[tokens_X[asking_X]]
        granted_A = rank_within(queue_A, priority_N[from_A], len(free_Q)) < free_Q[queue_A]
        found.append(torch.stack([from_A, experts_A])[:, granted_A])
        free_Q = free_Q - count(queue_A[granted_A], len(free_Q))
        head_X[asking_X[granted_A]] += 1
    from_A, experts_A = torch.cat(found, 1)
    return pairs.add(from_A, experts_A, pairs.moved_weights(from_A, experts_A), pairs.choices(from_A))


@dataclass(frozen=True)
class _Additions:
    """Pairs that a rectification adds: the wanted assignment that each replaces, and what it stands for."""

    tokens_A: Tensor
    experts_A: Tensor
    from_A: Tensor  # places among N
    number_A: Tensor  # how many choices
    choice_A: Tensor | None


def _rectified(pairs: Pairs, local_TE: Tensor | None, free_Q: Tensor | None, group_T: Tensor) -> Routing:
    """``local`` where there is a mask, ``fill_in`` where there are free places, and both where both are."""
    kept = pairs.kept.assignment
    number_TE = torch.zeros_like(pairs.scores_TE)
    number_TE[kept.token_ids_N, kept.expert_ids_N()] = 1
    added = []
    if local_TE is not None:
        home = _sent_home(pairs, local_TE)
        fresh_A = number_TE[home.tokens_A, home.experts_A] == 0
        number_TE[home.tokens_A, home.experts_A] += home.number_A.to(number_TE.dtype)
        added.append((home, fresh_A))
    if free_Q is not None:
        filled = _filled_in(pairs, free_Q, group_T, number_TE > 0)
        number_TE[filled.tokens_A, filled.experts_A] = 1
        added.append((filled, torch.ones_like(filled.tokens_A, dtype=torch.bool)))
    touched_T = torch.zeros_like(number_TE[:, 0], dtype=torch.bool)
    for additions, _ in added:
        touched_T = touched_T.index_fill(0, additions.tokens_A, True)
    return _shared_anew(pairs, number_TE, touched_T, added)


def _shared_anew(
    pairs: Pairs, number_TE: Tensor, touched_T: Tensor, added: list[tuple[_Additions, Tensor]]
) -> Routing:
    """``kept`` and the pairs of ``added`` that are new, a touched token's weights shared by n score."""
    wanted, kept = pairs.wanted.assignment, pairs.kept.assignment
    total_T = torch.zeros_like(number_TE[:, 0]).index_add(0, wanted.token_ids_N, wanted.weights_N.detach())
    sum_T = (number_TE * pairs.scores_TE.detach()).sum(1)
    some_T = touched_T & (sum_T > least_divisor(sum_T))
    scale_T = total_T / torch.where(some_T, sum_T, number_TE.sum(1))

    def weights(tokens: Tensor, experts: Tensor) -> Tensor:
        score = torch.where(some_T[tokens], pairs.scores_TE[tokens, experts], 1.0)
        return number_TE[tokens, experts] * score * scale_T[tokens]

    touched_M = touched_T[kept.token_ids_N]
    shared_M = weights(kept.token_ids_N, kept.expert_ids_N())
    reweighted = replace(kept, weights_N=torch.where(touched_M, shared_M, kept.weights_N))
    pairs = replace(pairs, kept=replace(pairs.kept, assignment=reweighted))
    tokens_A, experts_A, from_A = (
        torch.cat([getattr(a, name)[fresh_A] for a, fresh_A in added])
        for name in ("tokens_A", "experts_A", "from_A")
    )
    ranks = [a.choice_A[fresh_A] for a, fresh_A in added if a.choice_A is not None]
    choice_A = torch.cat(ranks) if len(ranks) == len(added) else None
    return pairs.add(from_A, experts_A, weights(tokens_A, experts_A), choice_A)


def _sent_home(pairs: Pairs, local_TE: Tensor) -> _Additions:
    """For each token that lost some of its choices, and has a local expert, the best one."""
    wanted, lost_L = pairs.wanted.assignment, pairs.lost_L
    if wanted.choice_N is not None:  # what h gets has the best rank among the lost
        lost_L = lost_L[torch.argsort(wanted.choice_N[lost_L], stable=True)]
    lost_L = lost_L[torch.argsort(wanted.token_ids_N[lost_L], stable=True)]
    tokens_X, number_X = torch.unique_consecutive(wanted.token_ids_N[lost_L], return_counts=True)
    first_X = lost_L[number_X.cumsum(0) - number_X]
    has_X = local_TE[tokens_X].any(1)
    tokens_A, number_A, from_A = tokens_X[has_X], number_X[has_X], first_X[has_X]
    best_A = first_max(pairs.scores_TE[tokens_A].detach().masked_fill(~local_TE[tokens_A], -torch.inf))
    return _Additions(tokens_A, best_A, from_A, number_A, pairs.choices(from_A))


def _filled_in(pairs: Pairs, free_Q: Tensor, group_T: Tensor, has_TE: Tensor) -> _Additions:
    """For each token whose next choice has a place left for it; not where ``has_TE`` says it is already."""
    scores_TE, wanted_TE = pairs.scores_TE.detach(), pairs.index_TE >= 0
    groups = len(free_Q) // max(scores_TE.shape[1], 1)
    tokens_X = (wanted_TE.any(1) & ~wanted_TE.all(1)).nonzero().squeeze(1)
    next_X = first_max(scores_TE[tokens_X].masked_fill(wanted_TE[tokens_X], -torch.inf))
    asking_X = ~has_TE[tokens_X, next_X]
    tokens_X, next_X = tokens_X[asking_X], next_X[asking_X]
    scores_XE, wanted_XE = scores_TE[tokens_X], wanted_TE[tokens_X]
    queue_X = next_X * groups + group_T[tokens_X]
    score_X = scores_XE.gather(1, next_X[:, None]).squeeze(1)
    granted_X = rank_within(queue_X, score_X, len(free_Q)) < free_Q[queue_X]
    weakest_X = first_max((-scores_XE).masked_fill(~wanted_XE, -torch.inf))
    from_A = pairs.index_TE[tokens_X, weakest_X][granted_X]
    tokens_A, experts_A = tokens_X[granted_X], next_X[granted_X]
    return _Additions(tokens_A, experts_A, from_A, torch.ones_like(from_A), wanted_XE.sum(1)[granted_X])

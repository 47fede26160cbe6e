"""Token rounding: each expert's tokens of a routing group, rounded to a multiple of a kernel's tile of rows.

Shapes: T tokens, E experts, N wanted assignments, A added ones; G routing groups of L tokens.

Source: Guo et al. 2025 (SonicMoE, arXiv:2512.14080): the assignment of a top-k router changes by less than a
tile an expert. What the router chose goes before what it did not, either part by score.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moetrain.moe.assign import rank_within, sequences_per_group
from moetrain.moe.context import RouterContext
from moetrain.moe.options import Rounding
from moetrain.moe.pairs import Pairs, least_divisor
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import first_max


def round_tokens(
    wanted: Routing, ctx: RouterContext, rule: Rounding, tile: int, group: str, total: float | None
) -> Routing:
    """``wanted`` with each expert's number of tokens in each routing group rounded to a multiple of ``tile``.

    ``nearest`` (half a tile: to the even multiple), ``up`` or ``down``. Down, an expert drops the tokens of
    its lowest scores; up, it adds those of the highest scores that did not choose it, ties to the earlier
    token. Tokens without any choice, padding among them, are never added: an expert that would need more gets
    all others, which need not be a multiple. Experts without a network keep what they have.

    An added weight is w score_new / score_old of the token's best choice, and the choice's forward scale is
    taken over. ``total``: what a token's weights sum to by the router's rule, or None where they sum to
    nothing in particular; then those of a changed token are made to sum to it again, differentiably.
    Additions are counted in ``repaired_E``, and ``demand_BE`` stays. Raises ValueError where there are no
    scores.
    """
    if wanted.scores_TE is None:
        raise ValueError(f"router.rounding={rule.name} needs a router with scores: set router.rounding=none")
    scores_TE, chosen_TE = wanted.scores_TE, _chosen(wanted)
    taken_TE = _taken(chosen_TE, scores_TE.detach(), wanted, ctx, rule, tile, group)
    kept_N = taken_TE[wanted.assignment.token_ids_N, wanted.assignment.expert_ids_N()]
    kept = wanted.assignment.select(kept_N.nonzero().squeeze(1), (taken_TE & chosen_TE).sum(0))
    pairs = Pairs.of(wanted, replace(wanted, assignment=kept), scores_TE)
    experts_A, tokens_A = (taken_TE & ~chosen_TE).t().nonzero().unbind(1)
    best_T = first_max(scores_TE.detach().masked_fill(~chosen_TE, -torch.inf))
    from_A = pairs.index_TE[tokens_A, best_T[tokens_A]]
    choice_A = chosen_TE.sum(1)[tokens_A] + rank_within(
        tokens_A, scores_TE.detach()[tokens_A, experts_A], len(scores_TE)
    )
    found = pairs.add(from_A, experts_A, pairs.moved_weights(from_A, experts_A), choice_A)
    return found if total is None else _summing_to(total, found, (taken_TE != chosen_TE).any(1))


def rounded(counts: Tensor, rule: Rounding, tile: int) -> Tensor:
    """Counts as multiples of ``tile``."""
    multiples, rest = counts // tile, counts % tile
    if rule is Rounding.nearest:
        up = (2 * rest > tile) | ((2 * rest == tile) & (multiples % 2 == 1))
    else:
        up = (rest > 0) & (rule is Rounding.up)
    return (multiples + up) * tile


def _chosen(routing: Routing) -> Tensor:
    assert routing.scores_TE is not None
    chosen_TE = torch.zeros_like(routing.scores_TE, dtype=torch.bool)
    chosen_TE[routing.assignment.token_ids_N, routing.assignment.expert_ids_N()] = True
    return chosen_TE


def _taken(
    chosen_TE: Tensor,
    scores_TE: Tensor,
    wanted: Routing,
    ctx: RouterContext,
    rule: Rounding,
    tile: int,
    group: str,
) -> Tensor:
    """The pairs [T, E] of the rounded assignment."""
    size = sequences_per_group(group, ctx.batch)
    shape = (ctx.batch // size, size * ctx.seq, chosen_TE.shape[1])
    scores_GLE, chosen_GLE = scores_TE.view(shape), chosen_TE.view(shape)
    addable_GLE = chosen_GLE.any(-1, keepdim=True) & ~chosen_GLE
    counts_GE = chosen_GLE.sum(1)
    target_GE = rounded(counts_GE, rule, tile).minimum(counts_GE + addable_GLE.sum(1))
    ffn = wanted.assignment.num_ffn_experts
    if ffn is not None:
        target_GE[:, ffn:] = counts_GE[:, ffn:]
    # the chosen, then what may be added, then the rest; each by score, ties to the earlier token
    by_score_GLE = scores_GLE.argsort(dim=1, descending=True, stable=True)
    class_GLE = (2 * chosen_GLE + addable_GLE.int()).gather(1, by_score_GLE)
    order_GLE = by_score_GLE.gather(1, class_GLE.argsort(dim=1, descending=True, stable=True))
    places_1L1 = torch.arange(shape[1], device=order_GLE.device)[None, :, None]
    rank_GLE = torch.empty_like(order_GLE).scatter_(1, order_GLE, places_1L1.expand(shape))
    return (rank_GLE < target_GE[:, None]).view(chosen_TE.shape)


def _summing_to(total: float, routing: Routing, changed_T: Tensor) -> Routing:
    """The changed tokens' weights, made to sum to ``total``; where they underflow, they stay as they are."""
    assignment = routing.assignment
    weights_N, tokens_N = assignment.weights_N, assignment.token_ids_N
    sum_T = weights_N.new_zeros(len(changed_T)).index_add(0, tokens_N, weights_N)
    usable_T = changed_T & (sum_T.detach() > least_divisor(sum_T))
    factor_T = torch.where(usable_T, total / sum_T.where(usable_T, 1.0), 1.0)
    return replace(routing, assignment=replace(assignment, weights_N=weights_N * factor_T[tokens_N]))

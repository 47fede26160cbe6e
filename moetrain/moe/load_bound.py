"""A hard bound on load: an expert that has had too many of a group's tokens so far is closed to the next one.

Shapes: T tokens, E experts, N wanted assignments, A added ones; G routing groups of L tokens, k choices.

Source: Pavlitskaya et al. 2022, arXiv:2204.10598 (hard constraints on the balance of experts, beside losses).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moetrain.moe.assign import sequences_per_group
from moetrain.moe.context import RouterContext
from moetrain.moe.pairs import Pairs
from moetrain.moe.routing import Routing


def bound_load(wanted: Routing, ctx: RouterContext, overload: float, group: str) -> Routing:
    """``wanted`` with every expert's load, after each token of a group, at most ceil((1 + overload) mean).

    Tokens come in order. The mean is that of all assignments of the group up to and including the token's
    own, over all experts. A token keeps what it chose of the experts that are still open, and takes its best
    open ones by score in place of the others, ties to the lower expert; it goes without where too few are
    open. What comes later has no say. The i-th lost choice of a token, by score, is replaced by its i-th
    addition, with weight w_old score_new / score_old. Additions are counted in ``repaired_E``, and
    ``demand_BE`` stays. Raises ValueError where there are no scores.
    """
    if wanted.scores_TE is None:
        raise ValueError("router.max_overload needs a router with scores: set router.max_overload=null")
    scores_TE = wanted.scores_TE.detach()
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    chosen_TE[wanted.assignment.token_ids_N, wanted.assignment.expert_ids_N()] = True
    groups = ctx.batch // sequences_per_group(group, ctx.batch)
    taken_TE = _taken(scores_TE, chosen_TE, groups, overload)
    kept_N = taken_TE[wanted.assignment.token_ids_N, wanted.assignment.expert_ids_N()]
    kept = wanted.assignment.select(kept_N.nonzero().squeeze(1), (taken_TE & chosen_TE).sum(0))
    pairs = Pairs.of(wanted, replace(wanted, assignment=kept), wanted.scores_TE)
    lost_T, lost_X = _by_score(chosen_TE & ~taken_TE, scores_TE)
    tokens_A, experts_A = _by_score(taken_TE & ~chosen_TE, scores_TE)
    if not len(tokens_A):
        return pairs.kept
    # Both are sorted by token, and no token has more additions than losses.
    first_T = torch.searchsorted(lost_T, tokens_A)
    nth_A = torch.arange(len(tokens_A), device=tokens_A.device) - torch.searchsorted(tokens_A, tokens_A)
    from_A = pairs.index_TE[tokens_A, lost_X[first_T + nth_A]]
    return pairs.add(from_A, experts_A, pairs.moved_weights(from_A, experts_A), pairs.choices(from_A))


@torch.no_grad()
def _taken(scores_TE: Tensor, chosen_TE: Tensor, groups: int, overload: float) -> Tensor:
    """What each token takes, bool [T, E]; one step a token, of all groups at once."""
    num_experts = scores_TE.shape[1]
    length = len(scores_TE) // max(groups, 1)
    # the chosen come before the others, either by score; NaN before all
    ranked_TE = scores_TE.nan_to_num(torch.inf).argsort(dim=-1, descending=True, stable=True)
    is_chosen_TE = chosen_TE.gather(1, ranked_TE)
    ranked_TE = ranked_TE.gather(1, is_chosen_TE.int().argsort(dim=-1, descending=True, stable=True))
    ranked_GLE = ranked_TE.view(groups, length, num_experts)
    number_GL = chosen_TE.sum(1).view(groups, length)
    limit_GL = ((1 + overload) * number_GL.cumsum(1).double() / num_experts - 1e-9).ceil().long()
    load_GE = torch.zeros(groups, num_experts, dtype=torch.int64, device=scores_TE.device)
    taken_GLE = torch.zeros_like(ranked_GLE, dtype=torch.bool)
    for place in range(length):
        ranked_GE = ranked_GLE[:, place]
        open_GE = load_GE.gather(1, ranked_GE) < limit_GL[:, place, None]
        takes_GE = open_GE & (open_GE.cumsum(1) <= number_GL[:, place, None])
        taken_GE = torch.zeros_like(takes_GE).scatter_(1, ranked_GE, takes_GE)
        taken_GLE[:, place] = taken_GE
        load_GE += taken_GE
    return taken_GLE.view(chosen_TE.shape)


def _by_score(mask_TE: Tensor, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The marked pairs' tokens and experts, by token, then by falling score, ties to the lower expert."""
    order_TE = scores_TE.nan_to_num(torch.inf).argsort(dim=-1, descending=True, stable=True)
    tokens, places = mask_TE.gather(1, order_TE).nonzero().unbind(1)
    return tokens, order_TE[tokens, places]

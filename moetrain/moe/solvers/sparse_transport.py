"""Optimal transport of tokens to experts with at most k tokens an expert (Liu et al. 2023, arXiv:2209.15466).

A plan P >= 0 in which every token has the mass 1 and every expert the same maximises
``sum P z - gamma / 2 sum P^2`` under a bound on the tokens of an expert. The bound is not convex, but the
semi-dual, over one potential a token, is concave and explicit; the plan is read off its solution.

Shapes: G groups, L tokens of a group with padding, E experts, K the most tokens of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.solvers.lbfgs import minimize
from moetrain.moe.topk_ops import top_ids


def sparse_plan(
    scores_GLE: Tensor,
    valid_GL: Tensor,
    most_G: Tensor,
    most: int,
    gamma: float,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """P, fp64 [G, L, E], 0 for padding; at most ``most_G`` tokens of each expert, and these at most ``most``.

    ``most`` is of L, not of the groups at hand, so that a group is solved to the same bits beside any others:
    at a kink a search goes by the last ones. Columns sum to the tokens / E; rows to 1 within ``tolerance``,
    where ``iterations`` suffice and the bound lets them: a plan of the semi-dual may miss rows where tokens
    tie for an expert's last place. Scores are finite; a group without tokens has no plan.
    """
    groups, length, num_experts = scores_GLE.shape
    out_G1L = ~valid_GL[:, None]
    scores_GEL = scores_GLE.double().transpose(1, 2).masked_fill(out_G1L, float("-inf")).contiguous()
    if not scores_GEL.numel():
        return scores_GEL.transpose(1, 2)
    mass_G = valid_GL.sum(-1).double() / num_experts

    def columns(potential_GL: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        return _columns(scores_GEL + potential_GL[:, None], most_G, most, mass_G, gamma, exact)

    def semi_dual(potential_GL: Tensor) -> tuple[Tensor, Tensor]:
        value_G, plan_GEL = columns(potential_GL, exact=False)
        rest_GL = (plan_GEL.sum(1) - 1).masked_fill(~valid_GL, 0.0)
        return value_G - potential_GL.sum(-1), rest_GL

    start_GL = torch.zeros(groups, length, dtype=torch.float64, device=scores_GLE.device)
    # potentials differ by no more than scores and what an expert's mass may take off one of them
    lowest_G = scores_GEL.masked_fill(out_G1L, float("inf")).amin((1, 2))
    spread_G = (scores_GEL.amax((1, 2)) - lowest_G).clamp(min=0) + gamma * mass_G
    potential_GL = minimize(semi_dual, start_GL, spread_G, iterations, tolerance)
    _, plan_GEL = columns(potential_GL, exact=True)
    return plan_GEL.transpose(1, 2)


def _columns(
    u_GEL: Tensor, most_G: Tensor, most: int, mass_G: Tensor, gamma: float, exact: bool
) -> tuple[Tensor, Tensor]:
    """(sum over experts of the best u y - gamma / 2 y^2, the y themselves [G, E, L]).

    y >= 0 has the mass of an expert and at most ``most_G`` elements that are not 0: u's largest, less a
    threshold, over gamma. ``exact``: of equal elements the earlier counts as the larger.
    """
    ids_GEK = top_ids(u_GEL, most) if exact else u_GEL.topk(most, dim=-1).indices
    top_GEK = u_GEL.gather(-1, ids_GEK)
    rank_K = torch.arange(1, most + 1, device=u_GEL.device)
    top_GEK = top_GEK.masked_fill(rank_K > most_G[:, None, None], float("-inf"))
    theta_GEK = (top_GEK.cumsum(-1) - gamma * mass_G[:, None, None]) / rank_K
    used_GE1 = (top_GEK > theta_GEK).sum(-1, keepdim=True)  # of those in order, the first so many
    theta_GE1 = theta_GEK.gather(-1, (used_GE1 - 1).clamp(min=0))
    y_GEK = ((top_GEK - theta_GE1) / gamma).clamp(min=0).masked_fill(used_GE1 == 0, 0.0)
    value_GEK = torch.where(y_GEK > 0, top_GEK * y_GEK - gamma / 2 * y_GEK.square(), 0.0)
    plan_GEL = torch.zeros_like(u_GEL).scatter_(-1, ids_GEK, y_GEK)
    return value_GEK.sum(-1).sum(-1), plan_GEL

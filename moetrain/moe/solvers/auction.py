"""Balanced assignment by auction (Bertsekas 1988), all groups at once and all tokens in parallel.

Shapes: G groups, L tokens of a group with padding, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.moe.topk_ops import top_ids


def capacities(scores_GLE: Tensor, valid_GL: Tensor) -> Tensor:
    """Tokens of each expert, int64 [G, E]: T // E, and one more for the T % E experts most tokens prefer."""
    num_experts = scores_GLE.shape[-1]
    tokens_G1 = valid_GL.sum(-1, keepdim=True)
    best_GL = top_ids(scores_GLE, 1).squeeze(-1).masked_fill(~valid_GL, num_experts)
    liked_GE = torch.zeros(len(tokens_G1), num_experts + 1, device=scores_GLE.device)
    liked_GE.scatter_add_(1, best_GL, torch.ones_like(best_GL, dtype=liked_GE.dtype))
    order_GE = top_ids(liked_GE[:, :-1], num_experts)
    extra_GE = torch.arange(num_experts, device=order_GE.device) < tokens_G1 % num_experts
    return tokens_G1 // num_experts + torch.zeros_like(order_GE).scatter_(1, order_GE, extra_GE.long())


def finite_scores(scores: Tensor) -> Tensor:
    """Scores that can be added up: NaN is 0, numbers are cut to the root of the largest one.

    Infinite scores become the largest and lowest finite ones.
    """
    if not scores.numel():
        return scores
    most = torch.finfo(scores.dtype).max ** 0.5
    kept = scores.where(scores.isfinite(), 0.0).clamp(-most, most)
    found = scores.where(~scores.isposinf(), kept.amax()).where(~scores.isneginf(), kept.amin())
    return found.where(~scores.isnan(), 0.0).clamp(-most, most)


def auction(
    scores_GLE: Tensor, valid_GL: Tensor, eps: float | Tensor, capacity_GE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(expert of each token [G, L], prices [G, E]); padding gets expert E.

    Every expert ends with its capacity (default :func:`capacities`; it must sum to the valid tokens). The
    total score is within ``tokens * eps`` of the best for those capacities: no token would gain more than
    ``eps`` (one number, or one per group) elsewhere at the final prices. An ``eps`` that rounding would
    swallow is raised. Scores are read as :func:`finite_scores` gives them.
    """
    num_experts = scores_GLE.shape[-1]
    scores_GLE = finite_scores(scores_GLE)
    scores_GLE = scores_GLE - scores_GLE.amax(-1, keepdim=True)  # changes no choice, and keeps digits
    capacity_GE = capacities(scores_GLE, valid_GL) if capacity_GE is None else capacity_GE
    eps_G = torch.as_tensor(eps, dtype=scores_GLE.dtype, device=scores_GLE.device).expand(len(scores_GLE))
    if scores_GLE.numel():
        kind = torch.finfo(scores_GLE.dtype)
        smallest = (64 * kind.eps * scores_GLE.abs().amax((1, 2))).clamp(min=kind.tiny)
        eps_G = torch.maximum(eps_G, smallest)
    price_GE = torch.zeros(capacity_GE.shape, dtype=scores_GLE.dtype, device=scores_GLE.device)
    price_GE = price_GE.masked_fill(capacity_GE == 0, float("inf"))
    expert_GL = torch.full(valid_GL.shape, num_experts, device=scores_GLE.device)
    bid_GL = torch.zeros(valid_GL.shape, dtype=scores_GLE.dtype, device=scores_GLE.device)
    while True:
        group_n, token_n = ((expert_GL == num_experts) & valid_GL).nonzero(as_tuple=True)
        if not len(group_n):
            return expert_GL, price_GE
        value_nE = scores_GLE[group_n, token_n] - price_GE[group_n]
        best_n2, ids_n2 = value_nE.topk(min(2, num_experts), dim=-1)
        margin_n = best_n2[:, 0] - best_n2[:, -1]
        margin_n = margin_n.masked_fill(~margin_n.isfinite(), 0.0)  # one expert has any room at all
        expert_GL[group_n, token_n] = ids_n2[:, 0]
        bid_GL[group_n, token_n] = price_GE[group_n, ids_n2[:, 0]] + margin_n + eps_G[group_n]
        _settle(expert_GL, bid_GL, price_GE, capacity_GE)


def _settle(expert_GL: Tensor, bid_GL: Tensor, price_GE: Tensor, capacity_GE: Tensor) -> None:
    """Each expert keeps its highest bids; where it is full, the lowest of them is its price. In place."""
    num_experts = price_GE.shape[1]
    order_GL = bid_GL.argsort(dim=-1, descending=True, stable=True)
    expert_by_bid_GL = expert_GL.gather(1, order_GL)
    place_GL = expert_by_bid_GL.argsort(dim=-1, stable=True)  # by expert, then by falling bid
    sorted_GL = expert_by_bid_GL.gather(1, place_GL)
    counts_GE1 = torch.zeros(len(price_GE), num_experts + 1, dtype=torch.int64, device=price_GE.device)
    counts_GE1.scatter_add_(1, expert_GL, torch.ones_like(expert_GL))
    starts_GE1 = counts_GE1.cumsum(1) - counts_GE1
    rank_GL = torch.arange(expert_GL.shape[1], device=price_GE.device) - starts_GE1.gather(1, sorted_GL)
    room_GE1 = torch.cat([capacity_GE, capacity_GE.new_full((len(capacity_GE), 1), expert_GL.shape[1])], 1)
    room_GL = room_GE1.gather(1, sorted_GL)
    tokens_GL = order_GL.gather(1, place_GL)
    expert_GL.scatter_(1, tokens_GL, sorted_GL.masked_fill(rank_GL >= room_GL, num_experts))
    last_GE = (starts_GE1[:, :-1] + capacity_GE - 1).clamp(0, max(expert_GL.shape[1] - 1, 0))
    lowest_GE = bid_GL.gather(1, tokens_GL).gather(1, last_GE)
    full_GE = (counts_GE1[:, :-1] >= capacity_GE) & (capacity_GE > 0)
    price_GE.copy_(lowest_GE.where(full_GE, price_GE))

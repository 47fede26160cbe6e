"""Which hidden units matter to which experts, and who gets them (LLaMA-MoE v2; Qu et al. 2024,
arXiv:2411.15708, and its released split_gradient_residual).

An expert's tokens are those whose input points most towards its router row. What a unit matters to an expert
is the mean over these of |activation x gradient| (SNIP's connection sensitivity; Lee et al. 2019,
arXiv:1810.02340). Ties go to the lower unit, then to the lower expert; in the released code they go to the
higher expert, and units that matter to equally many experts to the lower unit, as here.

Shapes: T tokens, D model, E experts, N hidden units of the dense network, n of those that are left to deal,
F of an expert, Q of the shared expert.
"""

from __future__ import annotations

import torch
from torch import Tensor


def importance(saliency_TN: Tensor, inputs_TD: Tensor, towards_ED: Tensor) -> Tensor:
    """fp64 [E, N]. An expert that no token points to takes the mean over all tokens."""
    saliency_TN = saliency_TN.double()
    expert_T = (inputs_TD.double() @ towards_ED.double().t()).argmax(1)
    means = []
    for expert in range(len(towards_ED)):
        own_TN = saliency_TN[expert_T == expert]
        means.append((own_TN if len(own_TN) else saliency_TN).mean(0))
    return torch.stack(means)


def most_wanted(importance_EN: Tensor, width: int, count: int) -> Tensor:
    """int64 [Q], ascending, Q = ``count``: the units that are among the first ``width`` of the most experts.

    Taken in rounds: of the units that are left, those that the most experts rank within their first
    ``width``, lower units first where there are too many, until there are enough.
    """
    left_N = torch.ones(importance_EN.shape[1], dtype=torch.bool)
    taken: list[int] = []
    while len(taken) < count:
        of_left_EN = importance_EN.masked_fill(~left_N, -1.0)
        first_EF = of_left_EN.sort(dim=1, descending=True, stable=True).indices[:, :width]
        votes_N = torch.bincount(first_EF.flatten(), minlength=len(left_N)) * left_N
        chosen = (votes_N == votes_N.max()).nonzero().flatten()[: count - len(taken)]
        left_N[chosen] = False
        taken += chosen.tolist()
    return torch.tensor(sorted(taken), dtype=torch.int64)


def deal_by_importance(importance_EN: Tensor, units_n: Tensor) -> Tensor:
    """int64 [E, F], ascending in each expert: all of ``units_n``, equally many to each.

    The largest importance of any unit that is left, to any expert with room, decides who is next.
    """
    experts = len(importance_EN)
    width = len(units_n) // experts
    values_nE = importance_EN[:, units_n].t()
    order = values_nE.flatten().sort(descending=True, stable=True).indices.tolist()
    dealt: list[list[int]] = [[] for _ in range(experts)]
    free = [True] * len(units_n)
    for pair in order:
        place, expert = divmod(pair, experts)
        if free[place] and len(dealt[expert]) < width:
            free[place] = False
            dealt[expert].append(int(units_n[place]))
    return torch.tensor(dealt, dtype=torch.int64).sort(1).values

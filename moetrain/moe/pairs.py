"""Wanted and kept assignments by (token, expert): what transforms of a Routing add assignments to.

Shapes: T tokens, E experts, N wanted assignments, L lost ones, A added ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.moe.assign import count
from moetrain.moe.routing import Routing


@dataclass(frozen=True)
class Pairs:
    """Wanted assignments by (token, expert). ``index_TE`` is the place among N, -1 where it is not wanted."""

    wanted: Routing
    kept: Routing
    scores_TE: Tensor
    experts_N: Tensor
    index_TE: Tensor
    lost_L: Tensor  # places among N

    @staticmethod
    def of(wanted: Routing, kept: Routing, scores_TE: Tensor) -> Pairs:
        experts_N, tokens_N = wanted.assignment.expert_ids_N(), wanted.assignment.token_ids_N
        places_N = torch.arange(len(tokens_N), device=tokens_N.device)
        index_TE = torch.full(scores_TE.shape, -1, device=tokens_N.device)
        index_TE[tokens_N, experts_N] = places_N
        lost_N = torch.ones_like(places_N, dtype=torch.bool)
        lost_N[index_TE[kept.assignment.token_ids_N, kept.assignment.expert_ids_N()]] = False
        return Pairs(wanted, kept, scores_TE, experts_N, index_TE, lost_N.nonzero().squeeze(1))

    def moved_weights(self, from_A: Tensor, experts_A: Tensor) -> Tensor:
        """w_old score_new / score_old; w_old where score_old is too small to divide by."""
        old_A = self.scores_TE[self.wanted.assignment.token_ids_N[from_A], self.experts_N[from_A]]
        new_A = self.scores_TE[self.wanted.assignment.token_ids_N[from_A], experts_A]
        weights_A = self.wanted.assignment.weights_N[from_A]
        usable_A = old_A.detach() > least_divisor(old_A)
        return torch.where(usable_A, weights_A * (new_A / old_A.where(usable_A, 1.0)), weights_A)

    def add(self, from_A: Tensor, experts_A: Tensor, weights_A: Tensor, choice_A: Tensor | None) -> Routing:
        """``kept`` with the added assignments sorted in; ``from_A``: places of those that they replace."""
        kept, tokens_A = self.kept, self.wanted.assignment.token_ids_N[from_A]
        tokens = torch.cat([kept.assignment.token_ids_N, tokens_A])
        experts = torch.cat([kept.assignment.expert_ids_N(), experts_A])
        order = torch.argsort(experts * max(len(self.scores_TE), 1) + tokens)
        scale_N, choice_N = self.wanted.assignment.forward_scale_N, kept.assignment.choice_N
        if choice_N is not None and choice_A is not None:
            choice_N = torch.cat([choice_N, choice_A])[order]
        if scale_N is not None and kept.assignment.forward_scale_N is not None:
            scale_N = torch.cat([kept.assignment.forward_scale_N, scale_N[from_A]])[order]
        assignment = replace(
            kept.assignment,
            token_ids_N=tokens[order],
            weights_N=torch.cat([kept.assignment.weights_N, weights_A])[order],
            counts_E=count(experts, kept.num_experts),
            choice_N=choice_N,
            forward_scale_N=scale_N,
            host_counts=None,
        )
        return replace(kept, assignment=assignment, repaired_E=count(experts_A, kept.num_experts))

    def choices(self, from_A: Tensor) -> Tensor | None:
        return None if self.wanted.assignment.choice_N is None else self.wanted.assignment.choice_N[from_A]


def least_divisor(scores: Tensor) -> float:
    """The least score to divide by: of what is below, the square, which gradients have, underflows."""
    return float(torch.finfo(scores.dtype).tiny ** 0.5)

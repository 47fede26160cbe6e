"""Routings of given logits, and the value of a loss that shapes scores.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moetrain.moe import RouterContext, Routing
from moetrain.moe.assign import from_mask
from moetrain.moe.balance import LossTerm, StepTotals


def softmax(logits_TE: Tensor) -> Tensor:
    return logits_TE.softmax(-1)


def routing_of(
    logits_TE: Tensor,
    batch: int = 1,
    valid_T: Tensor | None = None,
    score: Callable[[Tensor], Tensor] = torch.relu,
) -> Routing:
    """Every expert whose score is above 0, scores as weights."""
    scores_TE = score(logits_TE)
    ctx = replace(RouterContext.default(batch, len(logits_TE) // batch), valid_T=valid_T)
    return from_mask(scores_TE.detach() > 0, scores_TE, ctx, scores_TE, logits_TE)


def draw(tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64)


def value(term: LossTerm, routing: Routing, num_tokens: float | None = None) -> Tensor:
    totals = StepTotals(float(routing.num_tokens) if num_tokens is None else num_tokens)
    return term.value(routing, totals, 0)

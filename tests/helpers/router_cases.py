"""Routers that see given logits, and what a Routing chose as a matrix.

Shapes: T tokens, E experts, D model, N assignments.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from moetrain.moe import Routing, build_router
from moetrain.moe.routers.base import Router

SEEDS = st.integers(0, 2**20)


def looking_at_logits(name: str, num_experts: int, **options: object) -> Router:
    """A router whose input is its logits."""
    router = build_router(name, d_model=num_experts, num_experts=num_experts, **options).double()
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(num_experts))
    return router


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_weights(routing: Routing, tokens: int) -> Tensor:
    """[T, E], zero where nothing is assigned."""
    weights_TE = torch.zeros(tokens, routing.num_experts, dtype=routing.assignment.weights_N.dtype)
    weights_TE[routing.assignment.token_ids_N, routing.assignment.expert_ids_N()] = (
        routing.assignment.weights_N.detach()
    )
    return weights_TE


def chosen(routing: Routing, tokens: int) -> Tensor:
    mask_TE = torch.zeros(tokens, routing.num_experts, dtype=torch.bool)
    mask_TE[routing.assignment.token_ids_N, routing.assignment.expert_ids_N()] = True
    return mask_TE


def assert_sigmoids(weights_N: Tensor, logits_N: Tensor) -> None:
    """The weights, taken from a matrix of scores, are the logits' sigmoids.

    The last elements of a tensor may be computed by another exponential than those before: it, a sum and a
    quotient err by at most 5 * 2^-53 of the value on either side.
    """
    torch.testing.assert_close(weights_N, logits_N.sigmoid(), rtol=10 * 2**-53, atol=0)


def step_by_hand(t: Tensor, gamma: float) -> Tensor:
    """The smooth step of ``comet`` and ``dselect_k`` as their papers write it, on torch scalars."""
    if t <= -gamma / 2:
        return t * 0
    if t >= gamma / 2:
        return t * 0 + 1
    return -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5

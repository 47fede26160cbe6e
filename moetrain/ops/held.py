"""Parameters of which the first rows stay as they are while the others are trained.

The gradient of these rows is zero whatever the layout, so their moments are, and an optimizer without a decay
of weights moves them by no bit: :func:`hold` marks a parameter for the group that has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def hold(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter some of whose rows are held. Layouts and allocation keep the mark."""
    parameter.is_held = True  # type: ignore[attr-defined]
    return parameter


def is_held(parameter: Tensor) -> bool:
    """Whether :func:`hold` marked it."""
    return getattr(parameter, "is_held", False) is True


def held_rows(weight: Tensor, rows: int) -> Tensor:
    """``weight`` itself, whose gradient is zero in its first ``rows`` (of dimension 0)."""
    if rows <= 0:
        return weight
    held: Tensor = _HeldRows.apply(weight, rows)  # type: ignore[no-untyped-call]
    return held


class _HeldRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: int) -> Tensor:
        ctx.rows = rows
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, dweight: Tensor) -> tuple[Tensor, None]:
        there = torch.arange(len(dweight), device=dweight.device) >= ctx.rows
        kept: Tensor = there.view(-1, *[1] * (dweight.ndim - 1))
        return torch.where(kept, dweight, 0.0), None

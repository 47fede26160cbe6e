"""A tensor that two branches read, whose gradient is the sum of the two whatever order they come in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        return one + other


def fork(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two views of ``x``.

    Autograd adds gradients as they come, and a sum of three has other bits in another order: this one adds
    that of each branch as a whole.
    """
    views: tuple[Tensor, Tensor] = _Fork.apply(x)  # type: ignore[no-untyped-call]
    return views

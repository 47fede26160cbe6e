"""A loss that every trained parameter takes part in, so that all ranks sum the same gradients.

DeepSpeed sums gradients in the order in which backward passes finish them. A rank whose tokens miss a
parameter would leave it out, and the ranks' buffers would no longer match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def with_all_used(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """``loss``, whose gradient by each of ``parameters`` that it does not depend on is zero, not None."""
    used: Tensor = _AllUsed.apply(loss, *parameters)  # type: ignore[no-untyped-call]
    return used


class _AllUsed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros((), dtype=dtype, device=device).expand(s) for s, dtype, device in ctx.like]
        return dloss, *zeros

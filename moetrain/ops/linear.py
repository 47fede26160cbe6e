"""A linear layer whose products with the weight go through the faster of torch's libraries on a CPU.

Shapes: leading dimensions of x are free, n rows in all; K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.ops.cpu_product import product


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, as F.linear, under autocast too."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight_NK, bias_N)
    y_nN: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight_NK)  # type: ignore[no-untyped-call]
    y = y_nN.view(*x.shape[:-1], weight_NK.shape[0])
    return y if bias_N is None else y + bias_N


def wide_linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """``x @ weight.T`` in fp32 at least; x is kept for backward as it is, without a wider copy."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dtype is wide:
        return F.linear(x, weight_NK.to(wide))
    y: Tensor = _WideLinear.apply(x, weight_NK.to(wide))  # type: ignore[no-untyped-call]
    return y


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_nK, weight_NK)
        return F.linear(x_nK.to(weight_NK.dtype), weight_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_nN: Tensor) -> tuple[Tensor, Tensor]:
        x_nK, weight_NK = ctx.saved_tensors
        return (dy_nN @ weight_NK).to(x_nK.dtype), dy_nN.t() @ x_nK.to(weight_NK.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_nK, weight_NK)
        return product(x_nK, weight_NK.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_nN: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_nK, weight_NK = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        return product(dy_nN, weight_NK) if for_x else None, dy_nN.t() @ x_nK if for_weight else None

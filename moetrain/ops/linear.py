"""A linear layer that uses the faster of torch's libraries for its products on a CPU.

Shapes: leading dimensions of x are free, n rows in all; K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.ops.cpu.product import outer, product


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, as F.linear, under autocast too."""
    return linears(x, [weight_NK], [bias_N])[0]


def wide_linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """``x @ weight.T`` in fp32 at least; x is kept for backward as it is, without a wider copy."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dtype is wide:
        return linear(x, weight_NK.to(wide))
    y: Tensor = _WideLinear.apply(x, weight_NK.to(wide))  # type: ignore[no-untyped-call]
    return y


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """:func:`linear` of one input by several weights; the input's gradient is summed as the products come."""
    biases = [None] * len(weights) if biases is None else biases
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    products: tuple[Tensor, ...] = _Linears.apply(x.reshape(-1, x.shape[-1]), *weights)  # type: ignore[no-untyped-call]
    shaped = [y_nN.view(*x.shape[:-1], y_nN.shape[1]) for y_nN in products]
    return [y if bias is None else y + bias for y, bias in zip(shaped, biases, strict=True)]


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        y_nN = product(x.reshape(-1, x.shape[-1]).to(weight_NK.dtype), weight_NK.t())
        return y_nN.view(*x.shape[:-1], weight_NK.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight_NK = ctx.saved_tensors
        dy_nN, x_nK = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx_nK = product(dy_nN, weight_NK).to(x.dtype)
        return dx_nK.view_as(x), outer(dy_nN, x_nK.to(weight_NK.dtype))


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nK: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_nK, *weights)
        return tuple(product(x_nK, weight_NK.t()) for weight_NK in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_nK, *weights = ctx.saved_tensors
        for_x, *for_weights = ctx.needs_input_grad
        dx_nK: Tensor | None = None
        for dy_nN, weight_NK in zip(grads, weights, strict=True) if for_x else ():
            part_nK = product(dy_nN, weight_NK)
            dx_nK = part_nK if dx_nK is None else dx_nK.add_(part_nK)
        dweights = [
            outer(dy_nN, x_nK) if wanted else None for dy_nN, wanted in zip(grads, for_weights, strict=True)
        ]
        return dx_nK, *dweights

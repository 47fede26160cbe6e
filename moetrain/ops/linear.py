"""A linear layer without bias whose products on a CPU go through :func:`moetrain.ops.cpu_product.product`.

Shapes: leading dimensions of x are free, n rows in all; K inner, N outer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.ops.cpu_product import product


def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """``x @ weight.T``, [..., N]: torch's own, except for plain fp32 on a CPU."""
    plain = x.device.type == "cpu" and x.dtype is weight_NK.dtype is torch.float32
    if not plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight_NK)
    out: Tensor = _Linear.apply(x, weight_NK)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        return product(x.reshape(-1, x.shape[-1]), weight_NK.t()).view(*x.shape[:-1], weight_NK.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_NK = ctx.saved_tensors
        grad_nN = grad.reshape(-1, grad.shape[-1])
        need_x, need_weight = ctx.needs_input_grad
        dx = product(grad_nN, weight_NK).view_as(x) if need_x else None
        return dx, grad_nN.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None

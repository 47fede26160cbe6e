"""RMSNorm: computed in at least fp32, whatever the precision around it.

Shapes: D normalised width; leading dimensions are free.
Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moetrain.ops.init import Constant, parameter


class _RMSNormCPU(torch.autograd.Function):
    """torch has no fused RMSNorm for the CPU: this one takes a fifth of F.rms_norm's time there.

    The gradient is LayerNorm's with the mean set to zero, less the centring term of that fused kernel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, rstd)
        y: Tensor = (x * rstd).mul_(weight_D)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, rstd = ctx.saved_tensors
        width = x.shape[-1]
        dx, dweight_D, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, (width,), torch.zeros_like(rstd), rstd, weight_D, None, [True, True, False]
        )
        centring = (grad @ weight_D).unsqueeze(-1).mul_(rstd).div_(width)
        return dx.add_(centring), dweight_D, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, returned in x's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight_D = parameter((width,), Constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        x_wide, weight_D = x.to(dtype), self.weight_D.to(dtype)
        if x.device.type == "cpu":
            y: Tensor = _RMSNormCPU.apply(x_wide, weight_D, self.eps)  # type: ignore[no-untyped-call]
        else:
            y = F.rms_norm(x_wide, weight_D.shape, weight_D, self.eps)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight_D.shape[0]}, eps={self.eps}"

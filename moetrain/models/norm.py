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

from moetrain.ops.cheap import cheap, dropping, source
from moetrain.ops.init import Constant, parameter


class _RMSNormCPU(torch.autograd.Function):
    """torch has no fused RMSNorm for the CPU: this one takes a fifth of F.rms_norm's time there.

    The gradient is LayerNorm's with the mean set to zero, less the centring term of that fused kernel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = _wide(x)
        x_wide = x.to(wide)
        norm = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, rstd)
        y: Tensor = (x_wide * rstd).mul_(weight_D.to(wide))
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight_D, rstd = ctx.saved_tensors
        width, wide = x.shape[-1], _wide(x)
        grad_wide, weight_wide_D = grad.to(wide), weight_D.to(wide)
        dx, dweight_D, _ = torch.ops.aten.native_layer_norm_backward(
            grad_wide,
            x.to(wide),
            (width,),
            torch.zeros_like(rstd),
            rstd,
            weight_wide_D,
            None,
            [True, True, False],
        )
        centring = (grad_wide @ weight_wide_D).unsqueeze(-1).mul_(rstd).div_(width)
        return dx.add_(centring).to(x.dtype), dweight_D.to(weight_D.dtype), None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / rms(x) * weight in ``dtype``, None: the weight's; x is kept for backward as it is."""
    normed, dtype = _on_cpu if x.device.type == "cpu" else _fused, dtype or weight_D.dtype
    y = normed(x, weight_D, eps, dtype)
    if not dropping():
        return y
    x_again, weight_again_D = source(x), weight_D.detach()
    return cheap(y, lambda: normed(x_again(), weight_again_D, eps, dtype))


def _on_cpu(x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y: Tensor = _RMSNormCPU.apply(x, weight_D, eps, dtype)  # type: ignore[no-untyped-call]
    return y


def _fused(x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    # torch's own computes in fp32 at least where both have one dtype
    one = torch.promote_types(x.dtype, weight_D.dtype)
    return F.rms_norm(x.to(one), weight_D.shape, weight_D.to(one), eps).to(dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in the weight's dtype or in that which is asked for.

    ``zero_centered``: times 1 + weight, which starts at 0.
    """

    def __init__(self, width: int, eps: float, zero_centered: bool = False) -> None:
        super().__init__()
        self.eps, self.zero_centered = eps, zero_centered
        self.keeps_own_init = zero_centered  # else a model starts its vectors at 1
        self.weight_D = parameter((width,), Constant(0.0 if zero_centered else 1.0))

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.weight_D.dtype
        if self.zero_centered:  # the sum stays wide: near 1 a bf16 has no bits for a small weight
            return rms_norm(x, 1 + self.weight_D.to(_wide(self.weight_D)), self.eps, dtype)
        return rms_norm(x, self.weight_D.to(dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight_D.shape[0]}, eps={self.eps}"

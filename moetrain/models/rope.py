"""Rotary position embedding, in the half-split convention of Hugging Face checkpoints.

Shapes: B batch (1 where all rows share their positions), S sequence, N heads, H head width, h = H / 2.
Source: Su et al. 2021, "RoFormer"; element i is rotated together with element i + h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Rope(NamedTuple):
    """One forward pass's table, shared by all layers; at least fp32."""

    cos_BS1H: Tensor
    sin_BS1h: Tensor


def rope_table(positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
    """cos and sin of position * theta^(-2i / head_dim), in ``dtype`` (fp32 or fp64)."""
    steps_h = torch.arange(0, head_dim, 2, device=positions_BS.device).to(dtype)
    angle_BS1h = positions_BS[..., None, None].to(dtype) * (1.0 / theta ** (steps_h / head_dim))
    cos_BS1h = angle_BS1h.cos()
    return Rope(torch.cat([cos_BS1h, cos_BS1h], dim=-1), angle_BS1h.sin())


def apply_rope(x_BSNH: Tensor, rope: Rope) -> Tensor:
    """x with every head rotated, in x's dtype; the rotation itself is done in the table's."""
    y: Tensor = _Rotate.apply(x_BSNH, *rope)  # type: ignore[no-untyped-call]
    return y


def _rotate(x_BSNH: Tensor, cos_BS1H: Tensor, sin_BS1h: Tensor, sign: int) -> Tensor:
    x, half = x_BSNH.to(cos_BS1H.dtype), sin_BS1h.shape[-1]
    y = x * cos_BS1H
    y[..., :half].addcmul_(x[..., half:], sin_BS1h, value=-sign)
    y[..., half:].addcmul_(x[..., :half], sin_BS1h, value=sign)
    return y.to(x_BSNH.dtype)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so that nothing but the shared table is saved."""

    @staticmethod
    def forward(ctx: Any, x_BSNH: Tensor, cos_BS1H: Tensor, sin_BS1h: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BS1H, sin_BS1h)
        return _rotate(x_BSNH, cos_BS1H, sin_BS1h, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSNH: Tensor) -> tuple[Tensor, None, None]:
        cos_BS1H, sin_BS1h = ctx.saved_tensors
        return _rotate(grad_BSNH, cos_BS1H, sin_BS1h, -1), None, None

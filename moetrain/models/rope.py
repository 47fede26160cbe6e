"""Rotary position embedding, in the half-split convention of Hugging Face checkpoints.

Shapes: B batch (1 where all rows share their positions), S sequence, N heads, H head width, h = H / 2.
Source: Su et al. 2021, "RoFormer"; element i is rotated together with element i + h, or 2 i with 2 i + 1
where pairs are interleaved. The scalings' sources stand in ``rope_options.py``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.ops.cheap import cheap, dropping, source

_UNSCALED = RopeScaling()


class Rope(NamedTuple):
    """One forward pass's table, shared by all layers; at least fp32."""

    cos_BS1H: Tensor
    sin_BS1h: Tensor


def rope_table(
    positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling = _UNSCALED
) -> Rope:
    """cos and sin of position * theta^(-2i / head_dim), scaled, in ``dtype`` (fp32 or fp64)."""
    steps_h = torch.arange(0, head_dim, 2, device=positions_BS.device).to(dtype)
    frequency_h, size = _scaled(1.0 / theta ** (steps_h / head_dim), theta, scaling)
    angle_BS1h = positions_BS[..., None, None].to(dtype) * frequency_h
    cos_BS1h = angle_BS1h.cos().mul_(size)
    return Rope(torch.cat([cos_BS1h, cos_BS1h], dim=-1), angle_BS1h.sin().mul_(size))


def _scaled(frequency_h: Tensor, theta: float, s: RopeScaling) -> tuple[Tensor, float]:
    """(frequencies in radians a position, what cos and sin are multiplied by)."""
    if s.kind is RopeKind.none:
        return frequency_h, 1.0
    if s.kind is RopeKind.linear:
        return frequency_h / s.factor, 1.0
    if s.kind is RopeKind.llama3:
        return _between(frequency_h, s.factor, _llama3_kept(frequency_h, s)), 1.0
    size = 0.1 * math.log(s.factor) + 1 if s.attention_factor is None else s.attention_factor
    return _between(frequency_h, s.factor, _yarn_kept(frequency_h, theta, s)), size


def _between(frequency_h: Tensor, factor: float, kept_h: Tensor) -> Tensor:
    """The frequencies where ``kept_h`` is 1, divided by the factor where it is 0."""
    return frequency_h * kept_h + frequency_h / factor * (1 - kept_h)


def _llama3_kept(frequency_h: Tensor, s: RopeScaling) -> Tensor:
    """Linear in a pair's turns within the original length."""
    assert s.original_max_positions is not None
    turns_h = frequency_h * s.original_max_positions / (2 * math.pi)
    return ((turns_h - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)


def _yarn_kept(frequency_h: Tensor, theta: float, s: RopeScaling) -> Tensor:
    """Linear in the number of the pair, between those of ``beta_fast`` and of ``beta_slow`` turns."""
    assert s.original_max_positions is not None
    width = 2 * len(frequency_h)
    first, last = (
        width * math.log(s.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (s.beta_fast, s.beta_slow)
    )
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)  # the whole width, though there are half as many pairs
    pair_h = torch.arange(len(frequency_h), device=frequency_h.device).to(frequency_h.dtype)
    return 1 - ((pair_h - first) / (last - first or 1e-3)).clamp(0, 1)


def rope_width(head_dim: int, fraction: float) -> int:
    """How many elements of a head turn: ``fraction`` of them, rounded down as transformers rounds."""
    return int(head_dim * fraction)


def apply_rope(x_BSNH: Tensor, rope: Rope, interleaved: bool = False) -> Tensor:
    """x with every head rotated, in x's dtype; the rotation itself is done in the table's.

    A table that is narrower than a head rotates its first elements, and the others stay. ``interleaved``:
    neighbours are rotated together.
    """
    y: Tensor = _Rotate.apply(x_BSNH, *rope, interleaved)  # type: ignore[no-untyped-call]
    if not dropping():
        return y
    x_again = source(x_BSNH)
    return cheap(y, lambda: _rotate(x_again(), *rope, 1, interleaved))


def _rotate(x_BSNH: Tensor, cos_BS1H: Tensor, sin_BS1h: Tensor, sign: int, interleaved: bool) -> Tensor:
    x, half = x_BSNH.to(cos_BS1H.dtype), sin_BS1h.shape[-1]
    if interleaved or x.shape[-1] > 2 * half:
        return _rotate_pairs(x, cos_BS1H[..., :half], sin_BS1h, sign, interleaved).to(x_BSNH.dtype)
    y = x * cos_BS1H
    y[..., :half].addcmul_(x[..., half:], sin_BS1h, value=-sign)
    y[..., half:].addcmul_(x[..., :half], sin_BS1h, value=sign)
    return y.to(x_BSNH.dtype)


def _rotate_pairs(x: Tensor, cos_BS1h: Tensor, sin_BS1h: Tensor, sign: int, interleaved: bool) -> Tensor:
    """Any kind of pairs, and what lies beyond them as it is."""
    half = sin_BS1h.shape[-1]
    ones, others = (slice(half), slice(half, 2 * half))
    if interleaved:
        ones, others = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    y, one, other = x.clone(), x[..., ones], x[..., others]
    y[..., ones] = (one * cos_BS1h).addcmul_(other, sin_BS1h, value=-sign)
    y[..., others] = (other * cos_BS1h).addcmul_(one, sin_BS1h, value=sign)
    return y


class _Rotate(torch.autograd.Function):
    """The gradient is the rotation back, scaled alike, so that nothing but the shared table is saved."""

    @staticmethod
    def forward(ctx: Any, x_BSNH: Tensor, cos_BS1H: Tensor, sin_BS1h: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_BS1H, sin_BS1h)
        ctx.interleaved = interleaved
        return _rotate(x_BSNH, cos_BS1H, sin_BS1h, 1, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSNH: Tensor) -> tuple[Tensor, None, None, None]:
        cos_BS1H, sin_BS1h = ctx.saved_tensors
        return _rotate(grad_BSNH, cos_BS1H, sin_BS1h, -1, ctx.interleaved), None, None, None

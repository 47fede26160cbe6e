"""What the experts' operator is asked for: all that a backend needs to know to refuse it.

Shapes: E experts, D model, F hidden, P = 2F (gated) or F.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.ops.activations import is_gated

_SMALL = {"cpu": 32}  # widths of several tiles, of the interpreter's on a CPU
_SMALL_GPU, _LARGEST_BLOCK = 288, 128
TILE = 16  # the least width of a tile


@dataclass(frozen=True)
class Case:
    """``dtype``: of the products. ``d_model`` and ``d_ff``: widths of an expert. ``block``: what its rows are
    rounded up to a multiple of. ``keep``: whether pre-activations are kept for the backward pass. ``bias``:
    whether both projections have one. ``added``: whether there are low-rank products beside the matrices.
    """

    device: torch.device
    dtype: torch.dtype
    d_model: int
    d_ff: int
    activation: str
    block: int = 32
    keep: bool = True
    bias: bool = False
    added: bool = False

    @staticmethod
    def of(
        w_down_EFD: Tensor,
        dtype: torch.dtype,
        activation: str,
        block: int,
        keep: bool,
        bias: bool,
        added: bool,
    ) -> Case:
        """Raises ValueError for an unknown activation."""
        is_gated(activation)
        _, d_ff, d_model = w_down_EFD.shape
        return Case(w_down_EFD.device, dtype, d_model, d_ff, activation, block, keep, bias, added)

    def small(self, unit: int) -> Case:
        """The same with small widths, which ``unit`` divides or not as it does these, and a usual block."""
        least = -(-_SMALL.get(self.device.type, _SMALL_GPU) // unit) * unit
        d_model, d_ff = (least + width % unit for width in (self.d_model, self.d_ff))
        return replace(self, d_model=d_model, d_ff=d_ff, block=min(self.block, _LARGEST_BLOCK))

    @property
    def columns(self) -> int:
        """P, the columns of the up projection."""
        return self.d_ff * (2 if is_gated(self.activation) else 1)

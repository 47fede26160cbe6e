"""What the experts' operator is asked for: all that a backend needs to know to refuse it.

Shapes: E experts, D model, F hidden, P = 2F (gated) or F.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.ops.activations import is_gated

_SMALL, _TILE = 48, 16


@dataclass(frozen=True)
class Case:
    """``dtype``: of the products. ``d_model`` and ``d_ff``: widths of an expert."""

    device: torch.device
    dtype: torch.dtype
    d_model: int
    d_ff: int
    activation: str

    @staticmethod
    def of(w_down_EFD: Tensor, dtype: torch.dtype, activation: str) -> Case:
        """Raises ValueError for an unknown activation."""
        is_gated(activation)
        _, d_ff, d_model = w_down_EFD.shape
        return Case(w_down_EFD.device, dtype, d_model, d_ff, activation)

    def small(self) -> Case:
        """The same with small widths, which tiles divide or not as they do these."""
        d_model, d_ff = (_SMALL + width % _TILE for width in (self.d_model, self.d_ff))
        return replace(self, d_model=d_model, d_ff=d_ff)

    @property
    def columns(self) -> int:
        """P, the columns of the up projection."""
        return self.d_ff * (2 if is_gated(self.activation) else 1)

"""What a backend computes on: the operands of one call of the experts' operator.

Shapes: X source rows, D model, R computed rows in block-aligned expert order, E experts, F hidden,
P = 2F (gated) or F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.ops.experts.rows import Segments


@dataclass(frozen=True)
class Operands:
    """``ids_R`` and ``weights_R`` as in ``rows.py``; matrices may have another dtype than the source.

    ``bias_up_EP`` and ``bias_down_ED`` are both there, or neither is.
    """

    source_XD: Tensor
    ids_R: Tensor
    weights_R: Tensor
    w_up_EDP: Tensor
    w_down_EFD: Tensor
    segments: Segments
    activation: str
    bias_up_EP: Tensor | None = None
    bias_down_ED: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.source_XD.dtype

    @property
    def num_rows(self) -> int:
        """R, padding included."""
        return self.ids_R.shape[0]

    @property
    def columns(self) -> int:
        """P, the columns of the up projection."""
        return self.w_up_EDP.shape[2]

    def empty_out(self) -> Tensor:
        """Memory for the output [R, D]."""
        return self.source_XD.new_empty(self.num_rows, self.w_down_EFD.shape[2])

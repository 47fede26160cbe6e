"""What a backend computes on: the operands of one call of the experts' operator.

Shapes: X source rows, D model, R computed rows in block-aligned expert order, E experts, F hidden,
P = 2F (gated) or F, L rank of a product beside a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.ops.experts.rows import Segments


@dataclass(frozen=True)
class Pair:
    """Two narrow matrices an expert, whose product is added to its matrix [K, N], and their gradients.

    a_EKL, b_ELN  in any dtype; the product's factor is in one of them.
    da_EKL, db_ELN  what a backward pass fills, zero before; None in a forward pass.
    """

    a_EKL: Tensor
    b_ELN: Tensor
    da_EKL: Tensor | None = None
    db_ELN: Tensor | None = None

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        """What a backward pass fills."""
        assert self.da_EKL is not None
        assert self.db_ELN is not None
        return self.da_EKL, self.db_ELN


@dataclass(frozen=True)
class Operands:
    """``ids_R`` and ``weights_R`` as in ``rows.py``; matrices may have another dtype than the source.

    ``bias_up_EP`` and ``bias_down_ED`` are both there, or neither is. ``up`` and ``down``: what is added to
    the matrices; None: nothing. ``trained``: whether gradients of the matrices and the biases are wanted;
    where not, a backend may return anything for them.
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
    up: Pair | None = None
    down: Pair | None = None
    trained: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.source_XD.dtype

    @property
    def num_rows(self) -> int:
        """R, padding included."""
        return self.ids_R.shape[0]

    @property
    def biases(self) -> list[Tensor]:
        """Both, or none."""
        return [bias for bias in (self.bias_up_EP, self.bias_down_ED) if bias is not None]

    @property
    def columns(self) -> int:
        """P, the columns of the up projection."""
        return self.w_up_EDP.shape[2]

    def empty_out(self) -> Tensor:
        """Memory for the output [R, D]."""
        return self.source_XD.new_empty(self.num_rows, self.w_down_EFD.shape[2])

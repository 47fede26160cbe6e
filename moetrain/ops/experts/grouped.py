"""Experts by ``torch.nn.functional.grouped_mm``, all at once: the path of a GPU without Triton.

Shapes as in ``products.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops.experts import products
from moetrain.ops.experts.case import TILE, Case
from moetrain.ops.experts.operands import Operands
from moetrain.ops.experts.rows import all_rows
from moetrain.ops.grouped_mm import refusal as refusal_of_widths

ON_DEVICE, WIDTH_UNIT = True, TILE
kept_rows = all_rows


def refusal(case: Case) -> str | None:
    """Why torch's product of groups cannot serve ``case``."""
    operands = (case.d_model, case.columns), (case.d_ff, case.d_model)
    reasons = [refusal_of_widths(case.device, case.dtype, widths) for widths in operands]
    return next((reason for reason in reasons if reason is not None), None)


@dataclass(frozen=True)
class _Grouped:
    """``ends_E``: the end of each expert's rows, int32, as torch's grouped_mm wants it."""

    ends_E: Tensor

    @staticmethod
    def of(operands: Operands) -> _Grouped:
        return _Grouped(operands.segments.aligned_E.cumsum(0, dtype=torch.int32))

    def of_rows(self, x_RA: Tensor, w_EAB: Tensor) -> Tensor:
        return F.grouped_mm(x_RA, w_EAB, offs=self.ends_E)

    def of_weights(self, x_RA: Tensor, y_RB: Tensor) -> Tensor:
        return F.grouped_mm(x_RA.t(), y_RB, offs=self.ends_E)


def forward(operands: Operands, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """(out [R, D], [z [R, P]] or, not ``keep``, [])."""
    return products.forward(operands, keep, _Grouped.of(operands))


def backward(dout_RD: Tensor, operands: Operands, kept: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """(dx [R, D], dweights [R], dw_up, dw_down, and the biases'); experts without rows get zero gradients."""
    return products.backward(dout_RD, operands, kept, _Grouped.of(operands))

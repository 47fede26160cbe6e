"""Experts as grouped products in Triton (``kernels/grouped``): gather, activation and weighting are fused.

Shapes as in ``operator.py``; B blocks of rows, E1 = E + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from moetrain.ops.experts.case import TILE
from moetrain.ops.experts.operands import Operands
from moetrain.ops.experts.rows import all_rows
from moetrain.ops.experts.triton_cases import block_experts_B, block_starts_E1, refusal_of_kernels

if TYPE_CHECKING:
    from moetrain.kernels.metadata import Blocks

ON_DEVICE, WIDTH_UNIT = True, TILE
refusal, kept_rows = refusal_of_kernels, all_rows


def forward(operands: Operands, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """(out [R, D], [z [R, P]] or, not ``keep``, []). Rows behind the last used block are not written."""
    from moetrain.kernels import grouped

    out_RD, z_RP = grouped.forward(*_arguments(operands), operands.activation, keep)
    return out_RD, [] if z_RP is None else [z_RP]


def backward(dout_RD: Tensor, operands: Operands, kept: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """(dx [R, D], dweights [R], dw_up, dw_down); experts without rows get zero gradients."""
    from moetrain.kernels import grouped

    (z_RP,) = [None] if kept is None else kept
    return grouped.backward(dout_RD, *_arguments(operands), z_RP, operands.activation)


def _arguments(operands: Operands) -> tuple[Tensor, Blocks, Tensor, Tensor, Tensor]:
    from moetrain.kernels.metadata import Blocks

    segments, ids_R = operands.segments, operands.ids_R
    experts_B = block_experts_B(segments, operands.num_rows)
    rows = Blocks(segments.block, ids_R, block_starts_E1(segments), experts_B)
    return operands.source_XD, rows, operands.weights_R, operands.w_up_EDP, operands.w_down_EFD

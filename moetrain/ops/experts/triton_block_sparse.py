"""Experts as block-sparse products in Triton, the way of MegaBlocks (``kernels/block_sparse``).

Shapes as in ``operator.py``; B blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from moetrain.ops.experts.case import TILE
from moetrain.ops.experts.operands import Operands
from moetrain.ops.experts.rows import all_rows
from moetrain.ops.experts.triton_cases import block_experts_B, refusal_of_kernels

if TYPE_CHECKING:
    from moetrain.kernels.block_sparse.experts import Topologies

ON_DEVICE, WIDTH_UNIT = True, TILE
refusal, kept_rows = refusal_of_kernels, all_rows


def forward(operands: Operands, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """(out [R, D], [z [R, P]] or, not ``keep``, [])."""
    from moetrain.kernels.block_sparse import experts

    out_RD, z_RP = experts.forward(*_dense(operands), _topologies(operands), operands.activation)
    return out_RD, [z_RP] if keep else []


def backward(dout_RD: Tensor, operands: Operands, kept: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """(dx [R, D], dweights [R], dw_up, dw_down); experts without rows get zero gradients."""
    from moetrain.kernels.block_sparse import experts

    (z_RP,) = [None] if kept is None else kept
    topologies = _topologies(operands)
    return experts.backward(dout_RD, *_dense(operands), z_RP, topologies, operands.activation)


def _dense(operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    matrices = operands.w_up_EDP, operands.w_down_EFD
    return operands.source_XD, operands.ids_R, operands.weights_R, *matrices


def _topologies(operands: Operands) -> Topologies:
    from moetrain.kernels.block_sparse import experts

    segments, hidden = operands.segments, operands.w_down_EFD.shape[1]
    experts_B = block_experts_B(segments, operands.num_rows)
    return experts.topologies(experts_B, segments.num_experts, hidden, segments.block, operands.activation)

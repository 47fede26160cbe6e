"""Experts as block-sparse products in Triton, the way of MegaBlocks (``kernels/block_sparse``).

Shapes as in ``operator.py``; B blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from moetrain.ops.experts.rows import Segments, all_rows
from moetrain.ops.experts.triton_cases import block_experts_B, refusal_of_kernels

if TYPE_CHECKING:
    from moetrain.kernels.block_sparse.experts import Topologies

ON_DEVICE = True
refusal, kept_rows = refusal_of_kernels, all_rows


def forward(
    source_XD: Tensor,
    ids_R: Tensor,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    segments: Segments,
    activation: str,
) -> tuple[Tensor, list[Tensor]]:
    """(out [R, D], [z [R, P]])."""
    from moetrain.kernels.block_sparse import experts

    topology = _topologies(ids_R, w_down_EFD, segments, activation)
    out_RD, z_RP = experts.forward(source_XD, ids_R, weights_R, w_up_EDP, w_down_EFD, topology, activation)
    return out_RD, [z_RP]


def backward(
    dout_RD: Tensor,
    source_XD: Tensor,
    ids_R: Tensor,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    kept: Sequence[Tensor],
    segments: Segments,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [R, D], dweights [R], dw_up, dw_down); experts without rows get zero gradients."""
    from moetrain.kernels.block_sparse import experts

    topology = _topologies(ids_R, w_down_EFD, segments, activation)
    (z_RP,) = kept
    operands = (source_XD, ids_R, weights_R, w_up_EDP, w_down_EFD)
    return experts.backward(dout_RD, *operands, z_RP, topology, activation)


def _topologies(ids_R: Tensor, w_down_EFD: Tensor, segments: Segments, activation: str) -> Topologies:
    from moetrain.kernels.block_sparse import experts

    experts_B = block_experts_B(segments, ids_R.shape[0])
    hidden = w_down_EFD.shape[1]
    return experts.topologies(experts_B, segments.num_experts, hidden, segments.block, activation)

"""Experts as grouped products in Triton (``kernels/grouped``): gather, activation and weighting are fused.

Shapes as in ``operator.py``; B blocks of rows, E1 = E + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from moetrain.ops.experts.rows import Segments, all_rows
from moetrain.ops.experts.triton_cases import block_experts_B, block_starts_E1, refusal_of_kernels

if TYPE_CHECKING:
    from moetrain.kernels.metadata import Blocks

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
    """(out [R, D], [z [R, P]]). Rows behind the last used block are not written."""
    from moetrain.kernels import grouped

    rows = _blocks(ids_R, segments)
    out_RD, z_RP = grouped.forward(source_XD, rows, weights_R, w_up_EDP, w_down_EFD, activation)
    assert z_RP is not None
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
    from moetrain.kernels import grouped

    rows, (z_RP,) = _blocks(ids_R, segments), kept
    operands = (source_XD, rows, weights_R, w_up_EDP, w_down_EFD)
    return grouped.backward(dout_RD, *operands, z_RP, activation)


def _blocks(ids_R: Tensor, segments: Segments) -> Blocks:
    from moetrain.kernels.metadata import Blocks

    experts_B = block_experts_B(segments, ids_R.shape[0])
    return Blocks(segments.block, ids_R, block_starts_E1(segments), experts_B)

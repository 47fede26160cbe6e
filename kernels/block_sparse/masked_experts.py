"""An expert layer whose matrices are block-sparse: absent blocks are read in no pass and have gradients zero.

Shapes: X source rows, D model, R rows in block-aligned expert order (padding: id -1, weight 0), B blocks of
them, E experts, F hidden, P = 2F (gate columns, then up columns) or F.

Parameters are whole matrices [E, D, P] and [E, F, D]; what stands in their absent blocks is of no account.
Kept for backward: the source, the ids, the weights and z [R, P].
"""

from __future__ import annotations

from torch import Tensor

from .activation import weighted_activation, weighted_activation_backward
from .experts import gather_rows
from .masked import masked_gradient, masked_product
from .masks import MatrixBlocks
from .topology import rows_by_expert


def forward(
    source_XD: Tensor,
    ids_R: Tensor,
    experts_B: Tensor,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    up: MatrixBlocks,
    down: MatrixBlocks,
    activation: str,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out [R, D] in the source's type, z [R, P]); rows of blocks whose expert is -1 are 0.

    ``out[r] = weight[r] * act(source[ids[r]] @ w_up[e]) @ w_down[e]`` for the rows r of expert e, with zeros
    in the blocks that ``up`` and ``down`` do not have. Matrices of another type are cast. Raises ValueError
    for shapes that do not fit, and for fp64.
    """
    dtype = source_XD.dtype
    z_RP = masked_product(gather_rows(source_XD, ids_R), w_up_EDP.to(dtype), up, experts_B, tf32=tf32)
    h_RF = weighted_activation(z_RP, weights_R, experts_B, activation)
    return masked_product(h_RF, w_down_EFD.to(dtype), down, experts_B, tf32=tf32), z_RP


def backward(
    dout_RD: Tensor,
    source_XD: Tensor,
    ids_R: Tensor,
    experts_B: Tensor,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    z_RP: Tensor,
    up: MatrixBlocks,
    down: MatrixBlocks,
    activation: str,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [R, D], dweights [R], dw_up, dw_down); zeros in absent blocks and for experts without rows.

    Gradients of matrices have their types, and are rounded once. Raises ValueError as :func:`forward` does.
    """
    dtype = source_XD.dtype
    by_expert = rows_by_expert(experts_B, w_up_EDP.shape[0])
    dh_RF = masked_product(dout_RD, w_down_EFD.to(dtype), down, experts_B, transposed=True, tf32=tf32)
    dz_RP, h_RF, dweights_R = weighted_activation_backward(dh_RF, z_RP, weights_R, experts_B, activation)
    dw_down_EFD = masked_gradient(h_RF, dout_RD, down, by_expert, w_down_EFD.dtype, tf32)
    dx_RD = masked_product(dz_RP, w_up_EDP.to(dtype), up, experts_B, transposed=True, tf32=tf32)
    x_RD = gather_rows(source_XD, ids_R)
    return dx_RD, dweights_R, masked_gradient(x_RD, dz_RP, up, by_expert, w_up_EDP.dtype, tf32), dw_down_EFD

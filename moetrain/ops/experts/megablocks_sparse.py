"""Experts by MegaBlocks' block-sparse products (Gale et al. 2022, arXiv:2211.15841): ``stanford-stk``.

What the package ``megablocks`` adds to them, its router and CUDA kernels that lay out rows, has no place
behind this operator; rows are laid out here. The up projection's matrices are transposed once a pass, because
[E, D, F] is no matrix [D, E * F] in memory, and so are their gradients; w_down is read in place.

Shapes as in ``megablocks_products.py``; D model, P = C * F columns of the up projection (C: gate and up, or
one), N = E * F, M the 128 rows or columns of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moetrain.ops.activations import activate, activate_again, activate_backward
from moetrain.ops.experts.biases import NO_BIASES
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.megablocks_products import BLOCK, Sparse
from moetrain.ops.experts.operands import Operands
from moetrain.ops.experts.rows import all_rows
from moetrain.ops.experts.third_party import refusal_of_package, refusal_of_widths
from moetrain.ops.gather_sum import gather_rows

ON_DEVICE = True
WIDTH_UNIT = BLOCK
kept_rows = all_rows
_INSTALL = "pip install 'moetrain[megablocks]'"


def refusal(case: Case) -> str | None:
    """Why MegaBlocks' products cannot serve ``case``."""
    if case.bias:
        return NO_BIASES
    if case.block % BLOCK:
        return f"experts.block={case.block} is no multiple of {BLOCK}, the rows of its blocks"
    return refusal_of_package(case, "stk", _INSTALL) or refusal_of_widths(case, WIDTH_UNIT)


def forward(operands: Operands, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """(out [R, D], [z [R, P], block by block] or, not ``keep``, [])."""
    sparse = Sparse.of(operands)
    z_CSMM = _pre_activation(operands, sparse, _ups(operands))
    h_SMM = activate(*_gate_and_up(z_CSMM), operands.activation)
    h_SMM *= _scales(operands, h_SMM)
    out_RD = sparse.times(h_SMM, _down(operands))
    return out_RD, [z_CSMM.view(operands.num_rows, operands.columns)] if keep else []


def backward(dout_RD: Tensor, operands: Operands, kept: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """(dx [R, D], dweights [R], dw_up, dw_down); experts without rows get zero gradients."""
    sparse, ups_CDN, down_ND = Sparse.of(operands), _ups(operands), _down(operands)
    columns = len(ups_CDN)
    if kept is None:
        z_CSMM = _pre_activation(operands, sparse, ups_CDN)
    else:
        z_CSMM = kept[0].view(columns, -1, BLOCK, BLOCK)
    gate_SMM, up_SMM = _gate_and_up(z_CSMM)
    h_SMM, active_SMM = activate_again(gate_SMM, up_SMM, operands.activation)
    dh_SMM = sparse.sampled(dout_RD, down_ND.t(), torch.empty_like(h_SMM))
    weights_R = operands.weights_R
    dots_SM = torch.linalg.vecdot(dh_SMM.to(weights_R.dtype), h_SMM.to(weights_R.dtype))
    dweights_R = dots_SM.view(operands.num_rows // BLOCK, -1, BLOCK).sum(1).flatten()
    scaled_RD = dout_RD * weights_R.to(dout_RD.dtype)[:, None]
    dw_down_EFD = sparse.transposed_times(h_SMM, scaled_RD).view_as(operands.w_down_EFD)
    dh_SMM *= _scales(operands, dh_SMM)
    dz_CSMM = torch.empty_like(z_CSMM)
    dz = _gate_and_up(dz_CSMM)
    activate_backward(dh_SMM, gate_SMM, up_SMM, active_SMM, operands.activation, *dz)
    x_RD = gather_rows(operands.source_XD, operands.ids_R)
    dw_up_EDP = torch.empty_like(operands.w_up_EDP, memory_format=torch.contiguous_format)
    parts_CEDF = _by_columns(dw_up_EDP, columns)
    dx_RD = torch.zeros_like(x_RD)
    for part_EDF, up_DN, dz_SMM in zip(parts_CEDF, ups_CDN, dz_CSMM, strict=True):
        dw_ND = sparse.transposed_times(dz_SMM, x_RD)
        part_EDF.copy_(dw_ND.view(part_EDF.shape[0], -1, x_RD.shape[1]).transpose(1, 2))
        dx_RD += sparse.times(dz_SMM, up_DN.t())
    return dx_RD, dweights_R, dw_up_EDP, dw_down_EFD.to(operands.w_down_EFD.dtype)


def _pre_activation(operands: Operands, sparse: Sparse, ups_CDN: Tensor) -> Tensor:
    """z [C, S, 128, 128]."""
    x_RD = gather_rows(operands.source_XD, operands.ids_R)
    z_CSMM = x_RD.new_empty(len(ups_CDN), len(sparse.rows_S), BLOCK, BLOCK)
    for up_DN, z_SMM in zip(ups_CDN, z_CSMM, strict=True):
        sparse.sampled(x_RD, up_DN, z_SMM)
    return z_CSMM


def _ups(operands: Operands) -> Tensor:
    """The up projection's matrices, [C, D, E * F] in the products' dtype."""
    columns = operands.columns // operands.w_down_EFD.shape[1]
    parts_CDEF = _by_columns(operands.w_up_EDP, columns).transpose(1, 2)
    ups_CDEF = torch.empty(parts_CDEF.shape, dtype=operands.dtype, device=parts_CDEF.device)
    return ups_CDEF.copy_(parts_CDEF).flatten(2)


def _by_columns(w_EDP: Tensor, columns: int) -> Tensor:
    """A view [C, E, D, F]."""
    w_EDCF: Tensor = w_EDP.unflatten(2, (columns, -1))
    return w_EDCF.permute(2, 0, 1, 3)


def _down(operands: Operands) -> Tensor:
    return operands.w_down_EFD.to(operands.dtype).flatten(0, 1)


def _gate_and_up(z_CSMM: Tensor) -> tuple[Tensor | None, Tensor]:
    return (z_CSMM[0] if len(z_CSMM) == 2 else None), z_CSMM[-1]


def _scales(operands: Operands, of_SMM: Tensor) -> Tensor:
    """The routing weights of the rows of each block, [S, 128, 1]."""
    weights_BM1 = operands.weights_R.to(of_SMM.dtype).view(-1, BLOCK, 1)
    return weights_BM1.repeat_interleave(len(of_SMM) // len(weights_BM1), 0, output_size=len(of_SMM))

"""Block-sparse matrices and products in plain torch: dense matrices and a mask, one block at a time.

Shapes: B row blocks, C column blocks; M rows, K depth, P columns. Of experts: X source rows, D model, R rows,
E experts, F hidden, P = 2F (gate columns, then up columns) or F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import activate


def blocks(mask_BC: Tensor) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The (row, column) of the present blocks, row by row and column by column."""
    found = [(int(row), int(column)) for row, column in mask_BC.nonzero()]
    return sorted(found), sorted(found, key=lambda block: block[::-1])


def elements(mask_BC: Tensor, rows: int, columns: int, block_m: int, block_n: int) -> Tensor:
    """The bool mask [rows, columns] of the elements of present blocks."""
    mask_MP = mask_BC.new_zeros(rows, columns)
    for row, column in blocks(mask_BC)[0]:
        mask_MP[row * block_m : (row + 1) * block_m, column * block_n : (column + 1) * block_n] = True
    return mask_MP


def sdd(a_MK: Tensor, b_KP: Tensor, mask_MP: Tensor) -> Tensor:
    """``a @ b`` where the mask of elements is true, zero elsewhere."""
    return torch.where(mask_MP, a_MK @ b_KP, 0)


def dsd(sparse_MP: Tensor, dense_PN: Tensor, mask_MP: Tensor) -> Tensor:
    """``sparse @ dense`` of the elements where the mask is true; transpose both for ``S^T @ D``."""
    return torch.where(mask_MP, sparse_MP, 0) @ dense_PN


def dds(dense_QM: Tensor, sparse_MP: Tensor, mask_MP: Tensor) -> Tensor:
    """``dense @ sparse`` of the elements where the mask is true; transpose both for ``D @ S^T``."""
    return dense_QM @ torch.where(mask_MP, sparse_MP, 0)


def experts(
    source_XD: Tensor,
    ids_R: Tensor,
    experts_R: Tensor,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    activation: str,
) -> Tensor:
    """out [R, D] of an expert layer, a row at a time: zeros for a row with the id or the expert -1."""
    nothing_D = source_XD[:0].sum(0)  # of the source, for gradients where no row has an expert
    out_RD = [nothing_D] * ids_R.shape[0]
    for row, (source, expert) in enumerate(zip(ids_R.tolist(), experts_R.tolist(), strict=True)):
        if source >= 0 and expert >= 0:
            h_F = activate(source_XD[source] @ w_up_EDP[expert], activation)
            out_RD[row] = weights_R[row] * h_F @ w_down_EFD[expert]
    return torch.stack(out_RD) if out_RD else source_XD[:0]


def magnitude_mask(weights_EKW: Tensor, share: float, block: int, per_layer: bool = False) -> Tensor:
    """The mask of the share of blocks with the largest norms, of each expert or of all together."""
    experts, rows, columns = weights_EKW.shape
    mask_EIJ = torch.zeros(
        experts, -(-rows // block), -(-columns // block), dtype=torch.bool, device=weights_EKW.device
    )
    places = [(int(e), int(i), int(j)) for e, i, j in (~mask_EIJ).nonzero()]
    norms = {
        (e, i, j): weights_EKW[e, i * block : (i + 1) * block, j * block : (j + 1) * block].norm().item()
        for e, i, j in places
    }
    for pool in [places] if per_layer else [[p for p in places if p[0] == e] for e in range(experts)]:
        for place in sorted(pool, key=lambda p: -norms[p])[: max(1, round(share * len(pool)))]:
            mask_EIJ[place] = True
    return mask_EIJ

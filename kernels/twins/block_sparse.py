"""Block-sparse matrices and products in plain torch: dense matrices and a mask, one block at a time.

Shapes: B row blocks, C column blocks, N present blocks; M rows, K depth, P columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


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

"""Which blocks of the experts' own matrices are present: masks by magnitude, and their lists of blocks.

Shapes: E experts, K rows and W columns of each one's matrix, I row blocks, J column blocks, N present blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .topology import Lines, Side, mask_topology


@dataclass(frozen=True)
class MatrixBlocks:
    """The present blocks of one matrix [K, W] an expert; ``rows`` and ``columns`` have one group an expert.

    by_column  a line for each (expert, column block), across which are row blocks of that expert.
    by_row     a line for each (expert, row block), across which are column blocks.
    lines_N and columns_N, int32, are the line by row and the column block of each present block.
    """

    rows: Side
    columns: Side
    by_column: Lines
    by_row: Lines
    lines_N: Tensor
    columns_N: Tensor


def matrix_blocks(mask_EIJ: Tensor, rows: int, columns: int, block: int) -> MatrixBlocks:
    """The lists of a bool mask of square blocks; the last row and column of blocks may be partial.

    Waits for the device: made once for a mask, not once a step. Raises ValueError for a mask of another type
    or size, and for a block size without kernels.
    """
    experts = mask_EIJ.shape[0] if mask_EIJ.dim() == 3 else 0
    down, along = Side(block, rows, experts), Side(block, columns, experts)
    wanted = (experts, down.per_group, along.per_group)
    if tuple(mask_EIJ.shape) != wanted:
        raise ValueError(
            f"matrices of {rows} x {columns} in blocks of {block} need a mask of "
            f"[experts, {wanted[1]}, {wanted[2]}], not {tuple(mask_EIJ.shape)}"
        )
    flat, turned = mask_EIJ.flatten(0, 1), mask_EIJ.transpose(1, 2).flatten(0, 1)
    by_row = mask_topology(flat, flat.shape[0] * block, columns, block, block)
    by_column = mask_topology(turned, turned.shape[0] * block, rows, block, block)
    return MatrixBlocks(down, along, by_column.by_row, by_row.by_row, by_row.rows_N, by_row.columns_N)


def magnitude_mask(weights_EKW: Tensor, share: float, block: int, per_layer: bool = False) -> Tensor:
    """bool [E, I, J], true for the ``share`` of square blocks with the largest Frobenius norms.

    Each expert keeps ``round(share * I * J)`` blocks, one at least; with ``per_layer`` all experts together
    keep their share of all blocks. Of equal norms the earlier block is kept. Raises ValueError for a share
    outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of blocks to keep is above 0 and at most 1, not {share}")
    experts, rows, columns = weights_EKW.shape
    padded = torch.nn.functional.pad(weights_EKW.detach(), (0, -columns % block, 0, -rows % block))
    blocks = padded.unflatten(1, (-1, block)).unflatten(3, (-1, block))
    precise = torch.promote_types(weights_EKW.dtype, torch.float32)
    norms_EIJ = torch.linalg.vector_norm(blocks, dim=(2, 4), dtype=precise)
    scores = norms_EIJ.reshape(1 if per_layer else experts, -1)
    kept = max(1, round(share * scores.shape[1]))
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :kept]
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, order, True)
    return mask.view(norms_EIJ.shape)

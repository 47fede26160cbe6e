"""Which blocks of a block-sparse matrix are present, by row and by column, and where each is stored.

The matrix is cut in blocks of [rows.block, columns.block]. Its columns come in groups of one width, each cut
by itself, so that the last block of every group may be partial: the columns of an expert are one group. The
order by column is the transpose of Gale et al. 2022, "MegaBlocks" (arXiv:2211.15841): a product with the
transposed matrix reads the same stored blocks through it.

Shapes: L row blocks or column blocks, N stored blocks, B row blocks, C column blocks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS = (16, 32, 64, 128)
_MOST = 1 << 27  # blocks: a kernel counts an int32 step of 16 elements through all of them


@dataclass(frozen=True)
class Side:
    """The rows or the columns of a matrix: ``groups`` of ``width`` elements, cut in blocks of ``block``."""

    block: int
    width: int
    groups: int = 1

    @property
    def per_group(self) -> int:
        """Blocks of a group, the last of them partial where ``block`` does not divide ``width``."""
        return -(-self.width // self.block)

    @property
    def lines(self) -> int:
        """Blocks of all groups."""
        return self.groups * self.per_group

    @property
    def even(self) -> bool:
        """Whether no block is partial."""
        return self.width % self.block == 0


@dataclass(frozen=True)
class Lines:
    """The present blocks line by line; a line is a row of blocks, or a column of them.

    starts_L, ends_L  int32, line i has the entries [starts_L[i], ends_L[i]).
    stored_N          int32, where the block of each entry is stored.
    across_N          int32, its column block, or its row block where lines are columns.
    """

    starts_L: Tensor
    ends_L: Tensor
    stored_N: Tensor
    across_N: Tensor


@dataclass(frozen=True)
class Topology:
    """The present blocks of a matrix of ``rows`` x ``columns``, in both orders.

    Stored block n covers the rows ``n // per_line * rows.block`` onward of a values tensor, and its columns
    ``n % per_line * columns.block`` onward, up to ``stored_width``; it has the shape ``values_shape``.
    rows_N and columns_N, int32, are the row and the column of stored block n, both -1 where n stores none.
    """

    rows: Side
    columns: Side
    by_row: Lines
    by_column: Lines
    rows_N: Tensor
    columns_N: Tensor
    per_line: int
    stored_width: int

    @property
    def values_shape(self) -> tuple[int, int]:
        """Of the tensor of values: ``per_line`` blocks side by side, and such lines below each other."""
        return self.rows_N.shape[0] // self.per_line * self.rows.block, self.stored_width

    def lines(self, transposed: bool) -> tuple[Side, Side, Lines]:
        """The side whose blocks are the lines, the side across, and the entries; of the transpose if so."""
        if transposed:
            return self.columns, self.rows, self.by_column
        return self.rows, self.columns, self.by_row


def mask_topology(mask_BC: Tensor, rows: int, columns: int, block_m: int, block_n: int) -> Topology:
    """The topology of a boolean mask of blocks [row blocks, column blocks], each stored below the one before.

    Waits for the device once, since the number of present blocks is data. Raises ValueError for a mask of
    another type or size, and for a block size without kernels.
    """
    sides = _side(block_m, rows), _side(block_n, columns)
    wanted = (sides[0].lines, sides[1].lines)
    if mask_BC.dtype is not torch.bool or tuple(mask_BC.shape) != wanted:
        raise ValueError(
            f"a matrix of {rows} x {columns} in blocks of {block_m} x {block_n} needs a bool mask of "
            f"{wanted[0]} x {wanted[1]}, not {mask_BC.dtype} {tuple(mask_BC.shape)}"
        )
    _check(mask_BC.numel())
    rows_N, columns_N = mask_BC.nonzero(as_tuple=True)
    stored_BC = (mask_BC.flatten().cumsum(0) - 1).view(mask_BC.shape)
    across_N = mask_BC.t().nonzero(as_tuple=True)[1]
    by_row = _lines(mask_BC.sum(1), torch.arange(rows_N.shape[0], device=mask_BC.device), columns_N)
    by_column = _lines(mask_BC.sum(0), stored_BC.t()[mask_BC.t()], across_N)
    return Topology(*sides, by_row, by_column, rows_N.int(), columns_N.int(), 1, block_n)


def expert_topology(experts_B: Tensor, num_experts: int, width: int, block_m: int, block_n: int) -> Topology:
    """The topology of the dropless layer: the rows of expert e have all of its ``width`` columns, no others.

    ``experts_B`` is the expert of each block of ``block_m`` rows, -1 where it has none; their number is a
    bound and the host waits for nothing. The matrix has ``num_experts`` groups of columns. Its values tensor
    is [rows, width], where a row has the columns of its own expert; rows without an expert store nothing.
    Raises ValueError for a block size without kernels.
    """
    device, blocks = experts_B.device, experts_B.shape[0]
    sides = _side(block_m, blocks * block_m), _side(block_n, width, num_experts)
    per = sides[1].per_group
    _check(blocks * per)
    here_B = experts_B >= 0
    experts_B = torch.where(here_B, experts_B, num_experts).long()  # those without one are sorted last
    row_B, along_C = torch.arange(blocks, device=device), torch.arange(per, device=device)
    columns_N = (experts_B[:, None] * per + along_C).masked_fill_(~here_B[:, None], -1).view(-1)
    rows_N = row_B.masked_fill(~here_B, -1)[:, None].expand(-1, per).reshape(-1)
    starts_B = row_B * per
    ids_N = torch.arange(blocks * per, device=device)
    by_row = Lines(starts_B.int(), (starts_B + here_B * per).int(), ids_N.int(), columns_N.int())

    sorted_B, order_B, first_E, count_E = _by_expert(experts_B, num_experts)
    rank_B = row_B - first_E[sorted_B]
    starts_EC = first_E[:, None] * per + along_C * count_E[:, None]  # of each column
    entries_N = (starts_EC[sorted_B] + rank_B[:, None]).view(-1)
    stored_N = torch.empty_like(ids_N).scatter_(0, entries_N, (order_B[:, None] * per + along_C).view(-1))
    starts_C = starts_EC[:-1].reshape(-1)
    ends_C = (starts_EC + count_E[:, None])[:-1].reshape(-1)
    across_N = rows_N[stored_N]
    by_column = Lines(starts_C.int(), ends_C.int(), stored_N.int(), across_N.int())
    return Topology(*sides, by_row, by_column, rows_N.int(), columns_N.int(), per, width)


def rows_by_expert(experts_B: Tensor, num_experts: int) -> Lines:
    """The row blocks of each expert in ascending order, one line an expert; as :func:`expert_topology`."""
    experts_B = torch.where(experts_B >= 0, experts_B, num_experts).long()
    _, order_B, first_E, count_E = _by_expert(experts_B, num_experts)
    starts_E = first_E[:-1]
    rows_B = order_B.int()
    return Lines(starts_E.int(), (starts_E + count_E[:-1]).int(), rows_B, rows_B)


def _by_expert(experts_B: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorted experts, their order, each expert's first place and number; ``num_experts`` counts as one."""
    sorted_B, order_B = torch.sort(experts_B, stable=True)
    bounds_E = torch.searchsorted(sorted_B, torch.arange(num_experts + 2, device=experts_B.device))
    return sorted_B, order_B, bounds_E[:-1], bounds_E.diff()


def _side(block: int, width: int, groups: int = 1) -> Side:
    if block not in BLOCKS:
        raise ValueError(f"blocks have {', '.join(map(str, BLOCKS))} rows or columns, not {block}")
    return Side(block, width, groups)


def _check(blocks: int) -> None:
    if blocks > _MOST:
        raise ValueError(f"the matrix has {blocks} blocks, kernels count {_MOST} at most: take larger blocks")


def _lines(count_L: Tensor, stored_N: Tensor, across_N: Tensor) -> Lines:
    ends_L = count_L.cumsum(0)
    return Lines((ends_L - count_L).int(), ends_L.int(), stored_N.int(), across_N.int())

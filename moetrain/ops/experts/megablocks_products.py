"""The block-sparse products of package ``stanford-stk`` over the rows of experts.

Shapes: R block-aligned rows, E experts, F hidden, A any width; S nonzero blocks of 128 x 128 of a matrix
[R, E * F], in which an expert's rows have the columns of that expert alone, by rows, then columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.ops.experts.operands import Operands
from moetrain.ops.experts.third_party import require_addressable
from moetrain.ops.experts.triton_cases import block_experts_B, block_starts_E1

BLOCK = 128


@dataclass(frozen=True)
class Sparse:
    """Where the blocks lie, by rows and by columns, all int32. A matrix is its blocks, [S, 128, 128]."""

    shape: tuple[int, int]
    rows_S: Tensor
    columns_S: Tensor
    offsets: Tensor  # the first block of each row of blocks, and their number
    rows_by_column_S: Tensor
    blocks_by_column_S: Tensor
    offsets_by_column: Tensor

    @staticmethod
    def of(operands: Operands) -> Sparse:
        """Waits for nothing. Rows behind the last segment, which are zero, count as the last expert's."""
        experts, hidden = operands.w_down_EFD.shape[:2]
        segments, wide = operands.segments, hidden // BLOCK
        sub = segments.block // BLOCK
        experts_B = block_experts_B(segments, operands.num_rows).repeat_interleave(sub)
        experts_B = experts_B.masked_fill(experts_B < 0, experts - 1)
        device = experts_B.device
        columns_S = (experts_B[:, None] * wide + torch.arange(wide, device=device)).flatten()
        rows_S = torch.arange(len(columns_S), device=device) // wide
        by_column_S = columns_S.argsort(stable=True)
        starts_E1 = block_starts_E1(segments) * sub
        starts_E1[-1] = len(experts_B)
        sizes = starts_E1.diff().repeat_interleave(wide, output_size=experts * wide)
        return Sparse(
            shape=(operands.num_rows, experts * hidden),
            rows_S=rows_S.int(),
            columns_S=columns_S.int(),
            offsets=(torch.arange(len(experts_B) + 1, device=device) * wide).int(),
            rows_by_column_S=rows_S[by_column_S].int(),
            blocks_by_column_S=by_column_S.int(),
            offsets_by_column=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int(),
        )

    def sampled(self, left_RA: Tensor, right_AN: Tensor, out_S: Tensor) -> Tensor:
        """The blocks of left @ right, written to ``out_S``."""
        from stk.backend import triton_kernels

        require_addressable("megablocks", rows=left_RA, matrices=right_AN, hidden=out_S)
        where = self.offsets, self.rows_S, self.columns_S
        triton_kernels.sdd(left_RA, right_AN, self.shape, out_S, *where)
        return out_S

    def times(self, blocks_S: Tensor, right_NA: Tensor) -> Tensor:
        """[R, A]: the matrix times ``right``."""
        from stk.backend import triton_kernels

        out_RA = right_NA.new_empty(self.shape[0], right_NA.shape[1])
        require_addressable("megablocks", products=out_RA)
        triton_kernels.dsd(self.shape, blocks_S, *self._where(), False, right_NA, out_RA)
        return out_RA

    def transposed_times(self, blocks_S: Tensor, right_RA: Tensor) -> Tensor:
        """[E * F, A]: the transposed matrix times ``right``."""
        from stk.backend import triton_kernels

        out_NA = right_RA.new_empty(self.shape[1], right_RA.shape[1])
        turned = self.shape[1], self.shape[0]
        triton_kernels.dsd(turned, blocks_S, *self._where(), True, right_RA, out_NA)
        return out_NA

    def _where(self) -> tuple[Tensor, ...]:
        by_column = self.offsets_by_column, self.rows_by_column_S, self.blocks_by_column_S
        return self.offsets, self.rows_S, self.columns_S, *by_column

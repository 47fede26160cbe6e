"""The sum of each source row's computed rows, in one order: the way back of a gather, without atomics.

Shapes: R computed rows, D width, X source rows, N assignments.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .specimen import Specimen, pointer
from .tiles import DTYPES, Arch, arch_of


def combine(rows_RD: Tensor, by_source_N: Tensor, ends_X: Tensor) -> Tensor:
    """out [X, D]: the sum of ``rows[by_source[j]]`` for j from ``ends[x - 1]`` to ``ends[x]``, in that order.

    Sums are fp32 and rounded once to the rows' type; a source row without any gets zeros. ValueError for a
    type without kernels.
    """
    if rows_RD.dtype not in DTYPES:
        raise ValueError(f"kernels take bf16, fp16 and fp32, not {str(rows_RD.dtype).removeprefix('torch.')}")
    if rows_RD.stride(-1) != 1:
        rows_RD = rows_RD.contiguous()
    source_rows, width = ends_X.shape[0], rows_RD.shape[1]
    out_XD = rows_RD.new_empty(source_rows, width)
    if out_XD.numel():
        block = _block(arch_of(rows_RD.device), width)
        combine_kernel[(source_rows, triton.cdiv(width, block))](
            rows_RD,
            by_source_N,
            ends_X,
            out_XD,
            width,
            rows_RD.stride(0),
            out_XD.stride(0),
            BLOCK=block,
            num_warps=4,
        )
    return out_XD


def _block(arch: Arch, width: int) -> int:
    """Columns of a program; few in the interpreter, so that small tests cross their border."""
    return 16 if arch.interpreted else min(1024, triton.next_power_of_2(width))


@triton.jit
def combine_kernel(rows, by_source, ends, out, width, row_stride, out_stride, BLOCK: tl.constexpr):
    """BLOCK columns of one source row."""
    source_row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(ends + source_row - 1, mask=source_row > 0, other=0)
    count = tl.load(ends + source_row) - start
    sums = tl.zeros([BLOCK], tl.float32)
    for i in range(count.to(tl.int32)):
        row = tl.load(by_source + start + i)
        sums += tl.load(rows + row * row_stride + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + source_row * out_stride + column, sums.to(out.dtype.element_ty), mask=column < width)


def specimens(arch: Arch, width: int = 2048) -> list[Specimen]:
    """The kernel in each type."""
    signature = {
        "by_source": "*i64",
        "ends": "*i64",
        "width": "i32",
        "row_stride": "i32",
        "out_stride": "i32",
    }
    constants = {"BLOCK": _block(arch, width)}
    return [
        Specimen(
            f"combine {pointer(dtype)[1:]}", combine_kernel,
            signature | {"rows": pointer(dtype), "out": pointer(dtype)}, constants, 4, 1, False,
        )
        for dtype in DTYPES
    ]  # fmt: skip

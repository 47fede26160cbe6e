"""Rows times their expert's matrix, or its transpose by strides: down projection and input gradient.

Shapes: R block-aligned rows, E experts, K depth, N columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..metadata import Blocks
from ..specimen import Specimen, pointer
from ..tiles import BLOCK_M, Arch
from .parts import arch_for, precisions, row_launch, row_product, walk


def product(rows_RK: Tensor, meta: Blocks, w_EKN: Tensor, out_RN: Tensor, tf32: bool = False) -> None:
    """Write ``rows @ w[e]`` to ``out_RN``; rows behind the last used block are neither read nor written."""
    _, depth, width = w_EKN.shape
    arch = arch_for(rows_RK, w_EKN, out_RN, meta.ids_R)
    launch = row_launch(arch, rows_RK.dtype, meta.block, width, depth, tf32=tf32)
    row_tiles = launch.row_tiles(meta)
    product_kernel[(row_tiles * triton.cdiv(width, launch.tile.block_n),)](
        rows_RK, w_EKN, meta.block_expert_B, out_RN, row_tiles, depth, width, rows_RK.stride(0),
        *w_EKN.stride(), out_RN.stride(0), **launch.constants, **launch.options,
    )  # fmt: skip


@triton.jit(do_not_specialize=["row_tiles"])
def product_kernel(rows, w, block_expert, out, row_tiles, depth, width, row_stride, w_expert, w_depth,
                   w_column, out_stride, SUB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
                   UPCAST: tl.constexpr):  # fmt: skip
    """One tile of rows by columns."""
    row_tile, column_tile = walk(tl.program_id(0), row_tiles, tl.cdiv(width, BLOCK_N), GROUP)
    expert = tl.load(block_expert + row_tile // SUB).to(tl.int64)
    if expert < 0:
        return
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = row_product(rows, row, row >= 0, row_stride, w + expert * w_expert, w_depth, w_column, column,
                       width, depth, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)  # fmt: skip
    out_at = out + row[:, None] * out_stride + column[None, :]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=(column < width)[None, :])


def specimens(arch: Arch, depth: int = 768, width: int = 2048) -> list[Specimen]:
    """The down projection at every tile, and the input's gradient, whose matrix is transposed, at one."""
    found = [
        _specimen(arch, dtype, block, tf32, depth, width, "w_column")
        for dtype, tf32 in precisions()
        for block in BLOCK_M
    ]
    return found + [
        _specimen(arch, dtype, 128, tf32, width, depth, "w_depth") for dtype, tf32 in precisions()
    ]


def _specimen(
    arch: Arch, dtype: torch.dtype, block: int, tf32: bool, depth: int, width: int, contiguous: str
) -> Specimen:
    launch = row_launch(arch, dtype, block, width, depth, tf32=tf32)
    kind = pointer(dtype)
    signature = {"rows": kind, "w": kind, "block_expert": "*i32", "out": kind}
    sizes = {"row_tiles", "depth", "width", "row_stride", "w_expert", "w_depth", "w_column", "out_stride"}
    signature |= dict.fromkeys(sizes - {contiguous}, "i32")
    name = "down" if contiguous == "w_column" else "input gradient"
    label = f"{name} {kind[1:]}{' tf32' if tf32 else ''} {block} rows"
    products = dtype is not torch.float32 or tf32
    return Specimen(
        label, product_kernel, signature, {contiguous: 1} | launch.constants, **launch.options,
        products=products, tile=launch.tile,
    )  # fmt: skip

"""Rows times their expert's matrix, or its transpose by strides: down projection and input gradient.

Shapes: R block-aligned rows, E experts, K depth, N columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..descriptors import Operand, described, descriptor
from ..metadata import Blocks
from ..specimen import Specimen, pointer
from ..tiles import BLOCK_M, Arch, Tile
from .parts import (
    arch_for,
    described_product,
    form,
    forms,
    matrices,
    precisions,
    row_launch,
    row_product,
    turns_of,
    used,
    used_row_tiles,
    walk,
)


def product(rows_RK: Tensor, meta: Blocks, w_EKN: Tensor, out_RN: Tensor, tf32: bool = False) -> None:
    """Write ``rows @ w[e]`` to ``out_RN``; rows behind the last used block are neither read nor written."""
    experts, depth, width = w_EKN.shape
    arch = arch_for(rows_RK, w_EKN, out_RN, meta.ids_R)
    launch = row_launch(arch, rows_RK.dtype, meta.block, width, depth, tf32=tf32)
    left, right, flags = _operands(launch.tile, rows_RK, w_EKN)
    product_kernel[(launch.programs(meta, width, flags["DESCRIBED"]),)](
        left, right, meta.block_expert_B, meta.block_starts_E1, out_RN, launch.row_tiles(meta), experts,
        depth, width, rows_RK.stride(0), *w_EKN.stride(), out_RN.stride(0),
        PERSISTENT=launch.persistent(flags["DESCRIBED"]), **flags, **launch.constants, **launch.options,
    )  # fmt: skip


def _operands(size: Tile, rows_RK: Tensor, w_EKN: Tensor) -> tuple[Operand, Operand, dict[str, bool]]:
    """Both operands, as descriptors if both can be, and the constants that say so."""
    right, flags = matrices(size, w_EKN, rows_RK.dtype)
    if flags["DESCRIBED"]:
        left = described(rows_RK, (size.block_m, size.block_k), rows_RK.dtype)
        if left is not None:
            return left, right, flags
    return rows_RK, w_EKN, form(False)


@triton.jit(do_not_specialize=["row_tiles", "experts"])
def product_kernel(rows, w, block_expert, block_starts, out, row_tiles, experts, depth, width, row_stride,
                   w_expert, w_depth, w_column, out_stride, SUB: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
                   UPCAST: tl.constexpr, DESCRIBED: tl.constexpr, TURNED: tl.constexpr,
                   PERSISTENT: tl.constexpr):  # fmt: skip
    """A tile of rows by columns, or, PERSISTENT, every one of this program."""
    column_tiles = tl.cdiv(width, BLOCK_N)
    turns = 1
    if PERSISTENT:
        row_tiles = used_row_tiles(block_starts, experts, SUB)
        turns = turns_of(row_tiles * column_tiles)
    at = tl.program_id(0)
    for _ in range(turns):
        row_tile, column_tile = walk(at, row_tiles, column_tiles, GROUP)
        expert = tl.load(block_expert + row_tile // SUB).to(tl.int64)
        row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        column = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        if DESCRIBED:
            sums = described_product(rows, row_tile * BLOCK_M, w, expert, column_tile * BLOCK_N,
                                     used(expert, depth), BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
                                     TURNED)  # fmt: skip
        else:
            sums = row_product(rows, row, row >= 0, row_stride, w + expert * w_expert, w_depth, w_column,
                               column, width, used(expert, depth), BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
                               UPCAST)  # fmt: skip
        out_at = out + row[:, None] * out_stride + column[None, :]
        inside = (column < used(expert, width))[None, :]
        tl.store(out_at, sums.to(out.dtype.element_ty), mask=inside)
        at += tl.num_programs(0)


def specimens(arch: Arch, depth: int = 768, width: int = 2048) -> list[Specimen]:
    """The down projection at every tile, and the input's gradient, whose matrix is transposed, at one."""
    cases = [(dtype, block, tf32, False, depth, width) for dtype, tf32 in precisions() for block in BLOCK_M]
    cases += [(dtype, 128, tf32, True, width, depth) for dtype, tf32 in precisions()]
    return [each for case in cases for each in _specimens(arch, *case)]


def _specimens(
    arch: Arch, dtype: torch.dtype, block: int, tf32: bool, transposed: bool, depth: int, width: int
) -> list[Specimen]:
    launch = row_launch(arch, dtype, block, width, depth, tf32=tf32)
    kind, size, unit = pointer(dtype), launch.tile, "w_depth" if transposed else "w_column"
    signature = {"block_expert": "*i32", "block_starts": "*i64", "out": kind}
    sizes = {"row_tiles", "experts", "depth", "width", "row_stride", "w_expert", "w_depth", "w_column"}
    signature |= dict.fromkeys((sizes | {"out_stride"}) - {unit}, "i32")
    matrix = (1, size.block_n, size.block_k) if transposed else (1, size.block_k, size.block_n)
    left = (kind, descriptor(dtype, size.block_m, size.block_k))
    right = (kind, descriptor(dtype, *matrix))
    name = f"{'input gradient' if transposed else 'down'} {kind[1:]}{' tf32' if tf32 else ''} {block} rows"
    return [
        Specimen(
            name + words, product_kernel,
            signature | {"rows": left[flags["DESCRIBED"]], "w": right[flags["DESCRIBED"]]},
            {unit: 1, "PERSISTENT": launch.persistent(flags["DESCRIBED"])} | flags | launch.constants,
            **launch.options,
            products=dtype is not torch.float32 or tf32, tile=size,
        )
        for words, flags in forms(size, transposed)
    ]  # fmt: skip

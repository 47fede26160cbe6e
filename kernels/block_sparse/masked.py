"""Products of an expert's rows with its block-sparse matrix, and the gradient of the matrix's present blocks.

Matrices are stored whole; absent blocks are neither read nor written. Shapes: R rows in B blocks of one
expert, E experts, matrices of K rows and W columns, N present blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..specimen import Specimen
from ..tiles import Arch, Tile, tile
from .masks import MatrixBlocks
from .parts import checked, dot, has_shape, on_device, shipped, signature, walk
from .topology import BLOCKS, Lines


@triton.jit(do_not_specialize=["blocks"])
def product_kernel(
    out, a, b, experts, starts, ends, across, blocks, per, depth, width,
    out_m, out_n, a_m, a_k, b_group, b_k, b_n,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    TILE_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of the output: the present blocks of one column of blocks, TILE_K of the depth a step."""
    DOWN: tl.constexpr = BLOCK_M // TILE_M
    ALONG: tl.constexpr = BLOCK // TILE_N
    STEPS: tl.constexpr = BLOCK // TILE_K
    down, along = walk(tl.program_id(0), blocks * DOWN, per * ALONG, GROUP)
    m = down.to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    n = along.to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    expert = tl.load(experts + down // DOWN).to(tl.int64)
    line = tl.maximum(expert, 0) * per + along // ALONG
    first = tl.load(starts + line) * STEPS
    last = tl.where(expert < 0, first, tl.load(ends + line) * STEPS)
    a += m[:, None] * a_m
    b += expert * b_group + n[None, :] * b_n
    sums = tl.zeros((TILE_M, TILE_N), tl.float32)
    for step in range(first, last):
        block = tl.load(across + step // STEPS).to(tl.int64)
        k = block * BLOCK + step % STEPS * TILE_K + tl.arange(0, TILE_K)
        tile_a = tl.load(a + k[None, :] * a_k, mask=k[None, :] < depth, other=0.0)
        inside = (k[:, None] < depth) & (n[None, :] < width)
        tile_b = tl.load(b + k[:, None] * b_k, mask=inside, other=0.0)
        sums = dot(tile_a, tile_b, sums, PRECISION, UPCAST)
    out += m[:, None] * out_m + n[None, :] * out_n
    tl.store(out, sums.to(out.dtype.element_ty), mask=tl.broadcast_to(n[None, :] < width, TILE_M, TILE_N))


@triton.jit
def gradient_kernel(
    out, a, b, rows_of, columns_of, starts, ends, across, per, height, width,
    out_group, out_k, out_n, a_m, a_k, b_m, b_n,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    TILE_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of one present block: the rows of its expert in ascending order, TILE_K of them a step."""
    DOWN: tl.constexpr = BLOCK // TILE_M
    ALONG: tl.constexpr = BLOCK // TILE_N
    STEPS: tl.constexpr = BLOCK_M // TILE_K
    program = tl.program_id(0)
    present = program // (DOWN * ALONG)
    line = tl.load(rows_of + present).to(tl.int64)
    column = tl.load(columns_of + present).to(tl.int64)
    expert = line // per
    k = line % per * BLOCK + program // ALONG % DOWN * TILE_M + tl.arange(0, TILE_M)
    n = column * BLOCK + program % ALONG * TILE_N + tl.arange(0, TILE_N)
    sums = tl.zeros((TILE_M, TILE_N), tl.float32)
    for step in range(tl.load(starts + expert) * STEPS, tl.load(ends + expert) * STEPS):
        block = tl.load(across + step // STEPS).to(tl.int64)
        m = block * BLOCK_M + step % STEPS * TILE_K + tl.arange(0, TILE_K)
        at_a = a + k[:, None] * a_k + m[None, :] * a_m
        at_b = b + m[:, None] * b_m + n[None, :] * b_n
        tile_a = tl.load(at_a, mask=tl.broadcast_to(k[:, None] < height, TILE_M, TILE_K), other=0.0)
        tile_b = tl.load(at_b, mask=tl.broadcast_to(n[None, :] < width, TILE_K, TILE_N), other=0.0)
        sums = dot(tile_a, tile_b, sums, PRECISION, UPCAST)
    out += expert * out_group + k[:, None] * out_k + n[None, :] * out_n
    tl.store(out, sums.to(out.dtype.element_ty), mask=(k[:, None] < height) & (n[None, :] < width))


def masked_product(
    a_RK: Tensor,
    w_EKW: Tensor,
    blocks: MatrixBlocks,
    experts_B: Tensor,
    transposed: bool = False,
    tf32: bool = False,
) -> Tensor:
    """``a @ w`` [R, W] with each row's expert's matrix, or transposed ``a @ w^T`` [R, K] of a [R, W].

    Absent blocks count as zeros and are not read; rows of blocks whose expert is -1 give zeros. Sums are in
    fp32, in ascending order of the depth; fp32 operands are exact unless ``tf32``. Raises ValueError for
    shapes that do not fit, for several types or devices, and for fp64.
    """
    arch = checked(a_RK, w_EKW)
    depth, width = (blocks.columns, blocks.rows) if transposed else (blocks.rows, blocks.columns)
    lines = blocks.by_row if transposed else blocks.by_column
    rows, count = a_RK.shape[0], experts_B.shape[0]
    has_shape(w_EKW, "the matrices", blocks.rows.groups, blocks.rows.width, blocks.columns.width)
    has_shape(a_RK, "the left operand", rows, depth.width)
    out = a_RK.new_empty(rows, width.width)
    if out.numel() == 0:
        return out
    if transposed:
        w_EKW = w_EKW.mT
    block_m = _block_of(rows, count)
    size = tile(arch, a_RK.dtype, block_m, width.block, depth.block, tf32=tf32)
    programs = rows // size.block_m * width.per_group * (width.block // size.block_n)
    with on_device(a_RK):
        product_kernel[(programs,)](
            out, a_RK, w_EKW, experts_B, lines.starts_L, lines.ends_L, lines.across_N,
            count, width.per_group, depth.width, width.width,
            *out.stride(), *a_RK.stride(), *w_EKW.stride(),
            **constants(block_m, width.block, size, tf32, arch.interpreted), GROUP=size.group,
            num_warps=size.num_warps, num_stages=size.num_stages,
        )  # fmt: skip
    return out


def masked_gradient(
    a_RK: Tensor,
    dout_RW: Tensor,
    blocks: MatrixBlocks,
    by_expert: Lines,
    dtype: torch.dtype,
    tf32: bool = False,
) -> Tensor:
    """The gradient [E, K, W] of the matrices of ``a @ w``: 0 in absent blocks and for experts without rows.

    ``by_expert`` is of :func:`rows_by_expert`. Raises ValueError as :func:`masked_product` does.
    """
    arch = checked(a_RK, dout_RW)
    rows, columns, count = blocks.rows, blocks.columns, by_expert.across_N.shape[0]
    has_shape(a_RK, "the left operand", dout_RW.shape[0], rows.width)
    has_shape(dout_RW, "the gradient of the output", a_RK.shape[0], columns.width)
    out = torch.zeros(rows.groups, rows.width, columns.width, dtype=dtype, device=a_RK.device)
    present = blocks.columns_N.shape[0]
    if present == 0 or count == 0:
        return out
    block_m = _block_of(a_RK.shape[0], count)
    size = tile(arch, a_RK.dtype, rows.block, columns.block, block_m, tf32=tf32)
    programs = present * (rows.block // size.block_m) * (columns.block // size.block_n)
    with on_device(a_RK):
        gradient_kernel[(programs,)](
            out, a_RK, dout_RW, blocks.lines_N, blocks.columns_N,
            by_expert.starts_L, by_expert.ends_L, by_expert.across_N,
            rows.per_group, rows.width, columns.width,
            *out.stride(), *a_RK.stride(), *dout_RW.stride(),
            **constants(block_m, rows.block, size, tf32, arch.interpreted),
            num_warps=size.num_warps, num_stages=size.num_stages,
        )  # fmt: skip
    return out


def constants(block_m: int, block: int, size: Tile, tf32: bool, interpreted: bool) -> dict[str, object]:
    """What both kernels have of constants."""
    return {
        "BLOCK_M": block_m, "BLOCK": block, "TILE_M": size.block_m, "TILE_N": size.block_n,
        "TILE_K": size.block_k, "PRECISION": "tf32" if tf32 else "ieee", "UPCAST": interpreted,
    }  # fmt: skip


def _block_of(rows: int, blocks: int) -> int:
    """The rows of a block; ValueError if they have no kernels."""
    if rows % max(blocks, 1) or rows // max(blocks, 1) not in BLOCKS:
        raise ValueError(f"{rows} rows are no {blocks} blocks of {', '.join(map(str, BLOCKS))} rows each")
    return rows // blocks


# the strides that are 1: of x @ w and dz @ w^T
_LAYOUTS = {"rows": "b_n", "dx": "b_k"}


def specimens(arch: Arch) -> list[Specimen]:
    """Both kernels at every tile, with square blocks of 128."""
    found = []
    for dtype, tf32, block, every in shipped(arch):
        width = BLOCKS[-1]
        label, products = f"{dtype} {'tf32 ' if tf32 else ''}rows {block}", dtype.itemsize == 2 or tf32
        size = tile(arch, dtype, block, width, width, tf32=tf32)
        for name, unit in list(_LAYOUTS.items())[: None if every else 1]:
            fixed = constants(block, width, size, tf32, False)
            fixed |= {"GROUP": size.group, "out_n": 1, "a_k": 1, unit: 1}
            types = signature(product_kernel, fixed, dtype)
            found.append(
                Specimen(
                    f"masked {name} {label}", product_kernel, types, fixed, size.num_warps, size.num_stages,
                    products, size,
                )
            )  # fmt: skip
        size = tile(arch, dtype, width, width, block, tf32=tf32)
        fixed = constants(block, width, size, tf32, False) | {"out_n": 1, "a_k": 1, "b_n": 1}
        types = signature(gradient_kernel, fixed, dtype)
        found.append(
            Specimen(
                f"masked gradient {label}", gradient_kernel, types, fixed, size.num_warps, size.num_stages,
                products, size,
            )
        )  # fmt: skip
    return found

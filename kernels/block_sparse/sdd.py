"""SDD: the present blocks of a product of dense matrices, out of the topology; no other block is computed.

Shapes: M rows, K depth, G groups of W columns, V x W values tensor of the topology.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..specimen import Specimen
from ..tiles import Arch, Tile, tile
from .parts import checked, dot, has_shape, on_device, shipped, signature, walk
from .topology import BLOCKS, Side, Topology


@triton.jit(do_not_specialize=["lines", "row_width", "column_per", "column_width"])
def sdd_kernel(
    values, a, b, rows_of, columns_of,
    lines, row_width, column_per, column_width, stored_per, stored_width, depth,
    value_m, value_n, a_m, a_k, b_group, b_k, b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    TILE_K: tl.constexpr, ROWS_EVEN: tl.constexpr, COLUMNS_EVEN: tl.constexpr, STORED_EVEN: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of one stored block."""
    DOWN: tl.constexpr = BLOCK_M // TILE_M
    ALONG: tl.constexpr = BLOCK_N // TILE_N
    down, along = walk(tl.program_id(0), lines * DOWN, stored_per * ALONG, GROUP)
    line = (down // DOWN).to(tl.int64)
    position = (along // ALONG).to(tl.int64)
    stored = line * stored_per + position
    column = tl.load(columns_of + stored).to(tl.int64)
    if column < 0:
        return
    row = tl.load(rows_of + stored).to(tl.int64)
    in_m = down % DOWN * TILE_M + tl.arange(0, TILE_M).to(tl.int64)
    in_n = along % ALONG * TILE_N + tl.arange(0, TILE_N).to(tl.int64)
    at_m = row * BLOCK_M + in_m
    at_n = column % column_per * BLOCK_N + in_n
    a += at_m[:, None] * a_m
    b += column // column_per * b_group + at_n[None, :] * b_n
    sums = tl.zeros((TILE_M, TILE_N), tl.float32)
    for start in range(0, depth, TILE_K):
        k = start + tl.arange(0, TILE_K).to(tl.int64)
        here_a = k[None, :] < depth
        here_b = k[:, None] < depth
        if not ROWS_EVEN:
            here_a = here_a & (at_m[:, None] < row_width)
        if not COLUMNS_EVEN:
            here_b = here_b & (at_n[None, :] < column_width)
        tile_a = tl.load(a + k[None, :] * a_k, mask=here_a, other=0.0)
        tile_b = tl.load(b + k[:, None] * b_k, mask=here_b, other=0.0)
        sums = dot(tile_a, tile_b, sums, PRECISION, UPCAST)
    v_m = line * BLOCK_M + in_m
    v_n = position * BLOCK_N + in_n
    values += v_m[:, None] * value_m + v_n[None, :] * value_n
    if STORED_EVEN:
        tl.store(values, sums.to(values.dtype.element_ty))
    else:
        inside = tl.broadcast_to(v_n[None, :] < stored_width, TILE_M, TILE_N)
        tl.store(values, sums.to(values.dtype.element_ty), mask=inside)


def sdd(
    a_MK: Tensor,
    b_GKW: Tensor,
    topology: Topology,
    out_VW: Tensor | None = None,
    dtype: torch.dtype | None = None,
    tf32: bool = False,
) -> Tensor:
    """The values of ``a @ b`` in the topology's blocks, in ``out_VW`` or a new tensor of ``dtype``.

    Column c of group g is ``b_GKW[g, :, c]``; operands may have any strides. What the topology stores no
    block for is not written. Sums are in fp32, in the order of K; fp32 operands are exact unless ``tf32``.
    Raises ValueError for shapes that do not fit, for several types or devices, and for fp64.
    """
    arch = checked(a_MK, b_GKW)
    rows, columns, depth = topology.rows, topology.columns, a_MK.shape[1]
    has_shape(a_MK, "the left operand", rows.width, depth)
    has_shape(b_GKW, "the right operand", columns.groups, depth, columns.width)
    if out_VW is None:
        out_VW = a_MK.new_empty(topology.values_shape, dtype=dtype)
    has_shape(out_VW, "the tensor of values", *topology.values_shape)
    blocks = topology.rows_N.shape[0]
    if blocks == 0:
        return out_VW
    size = tile(arch, a_MK.dtype, rows.block, columns.block, depth, tf32=tf32)
    down, along = rows.block // size.block_m, columns.block // size.block_n
    with on_device(a_MK):
        sdd_kernel[(blocks * down * along,)](
            out_VW, a_MK, b_GKW, topology.rows_N, topology.columns_N,
            blocks // topology.per_line, rows.width, columns.per_group, columns.width, topology.per_line,
            topology.stored_width, depth,
            *out_VW.stride(), *a_MK.stride(), *b_GKW.stride(),
            **constants(rows, columns, topology.stored_width, size, tf32, arch.interpreted),
            num_warps=size.num_warps, num_stages=size.num_stages,
        )  # fmt: skip
    return out_VW


def constants(
    rows: Side, columns: Side, stored_width: int, size: Tile, tf32: bool, interpreted: bool
) -> dict[str, object]:
    """The kernel's constants for the blocks of two sides, stored side by side up to a width."""
    return {
        "BLOCK_M": rows.block, "BLOCK_N": columns.block, "TILE_M": size.block_m, "TILE_N": size.block_n,
        "TILE_K": size.block_k, "ROWS_EVEN": rows.even, "COLUMNS_EVEN": columns.even,
        "STORED_EVEN": stored_width % columns.block == 0, "GROUP": size.group,
        "PRECISION": "tf32" if tf32 else "ieee", "UPCAST": interpreted,
    }  # fmt: skip


# of the layer's products: the stride of the right operand that is 1, and the width of an expert
_LAYOUTS = (("z", "b_n", 1536), ("dh", "b_k", 768), ("rest", "b_n", 1539))


def specimens(arch: Arch) -> list[Specimen]:
    """z and the gradient of h at every tile, the latter with a transposed matrix; and a width with a rest."""
    found = []
    for dtype, tf32, block, every in shipped(arch):
        size = tile(arch, dtype, block, BLOCKS[-1], 2048, tf32=tf32)
        for name, unit, width in _LAYOUTS[: None if every else 1]:
            sides = Side(block, 32 * block), Side(BLOCKS[-1], width, 128)
            fixed = constants(*sides, width, size, tf32, False) | {"value_n": 1, "a_k": 1, unit: 1}
            found.append(
                Specimen(
                    f"sdd {name} {dtype} {'tf32 ' if tf32 else ''}rows {block}", sdd_kernel,
                    signature(sdd_kernel, fixed, dtype), fixed, size.num_warps, size.num_stages,
                    dtype.itemsize == 2 or tf32, size,
                )
            )  # fmt: skip
    return found

"""DSD: a block-sparse matrix, or its transpose, times a dense one. Lines without blocks give zeros.

Shapes: M rows, G groups of W columns, N columns of the dense matrix, V x W values tensor of the topology.
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


@triton.jit(do_not_specialize=["lines", "line_per", "line_width", "inner_per", "inner_width"])
def dsd_kernel(
    out, values, dense, starts, ends, stored, across,
    lines, line_per, line_width, inner_per, inner_width, columns, stored_per,
    value_down, value_along, value_line, value_inner,
    dense_group, dense_inner, dense_n, out_group, out_line, out_n,
    BLOCK_LINE: tl.constexpr, BLOCK_INNER: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    TILE_K: tl.constexpr, LINES_EVEN: tl.constexpr, INNER_EVEN: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of the output: a line's blocks in the order of their entries, TILE_K of the depth a step."""
    DOWN: tl.constexpr = BLOCK_LINE // TILE_M
    STEPS: tl.constexpr = BLOCK_INNER // TILE_K
    down, along = walk(tl.program_id(0), lines * DOWN, tl.cdiv(columns, TILE_N), GROUP)
    line = (down // DOWN).to(tl.int64)
    in_line = down % DOWN * TILE_M + tl.arange(0, TILE_M).to(tl.int64)
    at_line = line % line_per * BLOCK_LINE + in_line
    n = along.to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    first = tl.load(starts + line) * STEPS
    last = tl.load(ends + line) * STEPS
    sums = tl.zeros((TILE_M, TILE_N), tl.float32)
    for step in range(first, last):
        block = tl.load(stored + step // STEPS).to(tl.int64)
        inner = tl.load(across + step // STEPS).to(tl.int64)
        k = step % STEPS * TILE_K + tl.arange(0, TILE_K).to(tl.int64)
        at_k = inner % inner_per * BLOCK_INNER + k
        here = values + block // stored_per * value_down + block % stored_per * value_along
        here += in_line[:, None] * value_line + k[None, :] * value_inner
        there = dense + inner // inner_per * dense_group
        there += at_k[:, None] * dense_inner + n[None, :] * dense_n
        if LINES_EVEN and INNER_EVEN:
            tile_a = tl.load(here)
        else:
            inside_a = (at_line[:, None] < line_width) & (at_k[None, :] < inner_width)
            tile_a = tl.load(here, mask=inside_a, other=0.0)
        inside_b = n[None, :] < columns
        if not INNER_EVEN:
            inside_b = inside_b & (at_k[:, None] < inner_width)
        tile_b = tl.load(there, mask=inside_b, other=0.0)
        sums = dot(tile_a, tile_b, sums, PRECISION, UPCAST)
    inside = n[None, :] < columns
    if not LINES_EVEN:
        inside = inside & (at_line[:, None] < line_width)
    out += line // line_per * out_group + at_line[:, None] * out_line
    tl.store(out + n[None, :] * out_n, sums.to(out.dtype.element_ty), mask=inside)


def dsd(
    values_VW: Tensor,
    topology: Topology,
    dense: Tensor,
    transposed: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    tf32: bool = False,
) -> Tensor:
    """``S @ dense`` [M, N] of dense [G, W, N], or transposed ``S^T @ dense`` [G, W, N] of dense [M, N].

    ``S`` has the values in the topology's blocks and zeros elsewhere. The result is written to ``out``, or
    to a new tensor of ``dtype``. Operands may have any strides. Sums are in fp32, in the order of a line's
    entries; fp32 operands are exact unless ``tf32``. Raises ValueError for shapes that do not fit, for
    several types or devices, and for fp64.
    """
    arch = checked(values_VW, dense)
    line, inner, entries = topology.lines(transposed)
    rows, columns, count = topology.rows, topology.columns, dense.shape[-1]
    wide = (columns.groups, columns.width, count)
    has_shape(values_VW, "the tensor of values", *topology.values_shape)
    has_shape(dense, "the dense operand", *((rows.width, count) if transposed else wide))
    shape = wide if transposed else (rows.width, count)
    if out is None:
        out = dense.new_empty(shape, dtype=dtype)
    has_shape(out, "the output", *shape)
    if out.numel() == 0:
        return out
    size = tile(arch, dense.dtype, line.block, count, inner.block, tf32=tf32)
    down, along = values_VW.stride()
    of_value = (along, down) if transposed else (down, along)
    dense_GLN, out_GLN = (each if each.dim() == 3 else each[None] for each in (dense, out))
    programs = line.lines * (line.block // size.block_m) * -(-count // size.block_n)
    with on_device(dense):
        dsd_kernel[(programs,)](
            out_GLN, values_VW, dense_GLN,
            entries.starts_L, entries.ends_L, entries.stored_N, entries.across_N,
            line.lines, line.per_group, line.width, inner.per_group, inner.width, count, topology.per_line,
            down * rows.block, along * columns.block, *of_value, *dense_GLN.stride(), *out_GLN.stride(),
            **constants(line, inner, size, tf32, arch.interpreted),
            num_warps=size.num_warps, num_stages=size.num_stages,
        )  # fmt: skip
    return out


def constants(line: Side, inner: Side, size: Tile, tf32: bool, interpreted: bool) -> dict[str, object]:
    """The kernel's constants for lines and blocks of two sides."""
    return {
        "BLOCK_LINE": line.block, "BLOCK_INNER": inner.block, "TILE_M": size.block_m, "TILE_N": size.block_n,
        "TILE_K": size.block_k, "LINES_EVEN": line.even, "INNER_EVEN": inner.even, "GROUP": size.group,
        "PRECISION": "tf32" if tf32 else "ieee", "UPCAST": interpreted,
    }  # fmt: skip


# of the layer's products: whether of the transpose, and the strides that are 1
_LAYOUTS = {
    "out": (False, ("value_inner", "dense_n", "out_n")),
    "dx": (False, ("value_inner", "dense_inner", "out_n")),
    "dw_down": (True, ("value_line", "dense_n", "out_n")),
    "dw_up": (True, ("value_line", "dense_n", "out_line")),
}


def specimens(arch: Arch) -> list[Specimen]:
    """The products of the expert layer at every tile."""
    found = []
    for dtype, tf32, block, every in shipped(arch):
        sides = Side(block, 32 * block), Side(BLOCKS[-1], 768, 128)
        for name, (transposed, units) in list(_LAYOUTS.items())[: None if every else 1]:
            line, inner = sides[::-1] if transposed else sides
            size = tile(arch, dtype, line.block, 2048, inner.block, tf32=tf32)
            fixed = constants(line, inner, size, tf32, False) | dict.fromkeys(units, 1)
            found.append(
                Specimen(
                    f"dsd {name} {dtype} {'tf32 ' if tf32 else ''}rows {block}", dsd_kernel,
                    signature(dsd_kernel, fixed, dtype), fixed, size.num_warps, size.num_stages,
                    dtype.itemsize == 2 or tf32, size,
                )
            )  # fmt: skip
    return found

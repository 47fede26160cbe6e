"""The gradient of experts' matrices: a product over each expert's own number of rows.

An expert's row blocks are split into a number of chunks that no token count changes; the chunks' products,
fp32, are summed in their order in a second pass. An expert without rows gets zeros.

Shapes: X source rows, R block-aligned rows, E experts, K depth, N columns, C chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..metadata import Blocks
from ..specimen import Specimen, pointer
from ..tiles import BLOCK_M, Arch
from .parts import Launch, arch_for, gradient_launch, multiply, precisions, walk

_PROGRAMS = 512  # that keep a large device busy
_MOST_CHUNKS = 8
_MOST_BYTES = 64 << 20  # of the chunks' products


def weight_gradient(
    left: Tensor,
    right: Tensor,
    meta: Blocks,
    out_EKN: Tensor,
    gathered: tuple[bool, bool] = (False, False),
    tf32: bool = False,
) -> None:
    """Write ``left[rows of e].T @ right[rows of e]`` to the contiguous ``out_EKN``.

    Each operand has a row for each computed row, or, if ``gathered``, one for each source row. Rows without a
    source are not read.
    """
    experts, depth, width = out_EKN.shape
    arch = arch_for(left, right, out_EKN, meta.ids_R)
    launch = gradient_launch(arch, left.dtype, meta.block, depth, width, tf32)
    tiles = _tiles(launch, depth, width)
    chunks = num_chunks(arch, launch, experts, depth, width)
    parts = out_EKN
    if chunks > 1:
        parts = torch.empty(chunks, *out_EKN.shape, dtype=torch.float32, device=out_EKN.device)
    weight_gradient_kernel[(tiles, experts, chunks)](
        left, right, meta.ids_R, meta.block_starts_E1, parts, depth, width, experts, left.stride(0),
        right.stride(0), chunks, GATHERED_LEFT=gathered[0], GATHERED_RIGHT=gathered[1], **launch.constants,
        **launch.options,
    )  # fmt: skip
    if chunks > 1:
        size = out_EKN.numel()
        sum_chunks_kernel[(triton.cdiv(size, 1024),)](
            parts, out_EKN, size, CHUNKS=chunks, BLOCK=1024, num_warps=4
        )


def num_chunks(arch: Arch, launch: Launch, experts: int, depth: int, width: int) -> int:
    """Chunks of an expert's rows: more where experts and tiles are too few to fill a device."""
    programs = _tiles(launch, depth, width) * experts
    room = _MOST_BYTES // (4 * experts * depth * width)
    wanted: int = triton.cdiv(3 if arch.interpreted else _PROGRAMS, programs)
    return max(1, min(wanted, _MOST_CHUNKS, room))


def _tiles(launch: Launch, depth: int, width: int) -> int:
    return int(triton.cdiv(depth, launch.tile.block_m) * triton.cdiv(width, launch.tile.block_n))


@triton.jit
def weight_gradient_kernel(left, right, ids, block_starts, out, depth, width, experts, left_stride,
                           right_stride, chunks, GATHERED_LEFT: tl.constexpr, GATHERED_RIGHT: tl.constexpr,
                           BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                           BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
                           UPCAST: tl.constexpr):  # fmt: skip
    """One tile of one expert's gradient over one chunk of its rows."""
    row_tile, column_tile = walk(tl.program_id(0), tl.cdiv(depth, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    expert = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(2).to(tl.int64)
    start = tl.load(block_starts + expert)
    blocks = tl.load(block_starts + expert + 1) - start
    first = start + blocks * chunk // chunks
    steps = (start + blocks * (chunk + 1) // chunks - first) * (BLOCK // BLOCK_K)

    k = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = first * BLOCK + tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(steps.to(tl.int32)):
        token = tl.load(ids + row)
        left_row = row
        right_row = row
        if GATHERED_LEFT:
            left_row = token
        if GATHERED_RIGHT:
            right_row = token
        left_mask = (k < depth)[:, None] & (token >= 0)[None, :]
        right_mask = (token >= 0)[:, None] & (column < width)[None, :]
        a = tl.load(left + left_row[None, :] * left_stride + k[:, None], mask=left_mask, other=0.0)
        b = tl.load(right + right_row[:, None] * right_stride + column[None, :], mask=right_mask, other=0.0)
        sums = multiply(a, b, sums, PRECISION, UPCAST)
        row += BLOCK_K
    out_at = out + ((chunk * experts + expert) * depth + k)[:, None] * width + column[None, :]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=(k < depth)[:, None] & (column < width)[None, :])


@triton.jit
def sum_chunks_kernel(parts, out, size, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of the chunks' parts in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for chunk in range(CHUNKS):
        sums += tl.load(parts + (tl.full([], 0, tl.int64) + chunk) * size + at, mask=at < size, other=0.0)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=at < size)


def specimens(arch: Arch, depth: int = 2048, width: int = 1536) -> list[Specimen]:
    """The up projection's gradient (its left operand gathered) at every tile."""
    found = [
        _specimen(arch, dtype, block, tf32, depth, width) for dtype, tf32 in precisions() for block in BLOCK_M
    ]
    for dtype in (torch.bfloat16, torch.float32):
        signature = {"parts": "*fp32", "out": pointer(dtype), "size": "i32"}
        constants = {"CHUNKS": _MOST_CHUNKS, "BLOCK": 1024}
        label = f"sum chunks {pointer(dtype)[1:]}"
        found.append(Specimen(label, sum_chunks_kernel, signature, constants, 4, 1, False))
    return found


def _specimen(arch: Arch, dtype: torch.dtype, block: int, tf32: bool, depth: int, width: int) -> Specimen:
    launch = gradient_launch(arch, dtype, block, depth, width, tf32)
    kind = pointer(dtype)
    signature = {"left": kind, "right": kind, "ids": "*i64", "block_starts": "*i64", "out": kind}
    signature |= dict.fromkeys(("depth", "width", "experts", "left_stride", "right_stride", "chunks"), "i32")
    constants = {"GATHERED_LEFT": True, "GATHERED_RIGHT": False} | launch.constants
    label = f"weight gradient {kind[1:]}{' tf32' if tf32 else ''} {block} rows"
    products = dtype is not torch.float32 or tf32
    return Specimen(
        label, weight_gradient_kernel, signature, constants, **launch.options, products=products,
        tile=launch.tile,
    )  # fmt: skip

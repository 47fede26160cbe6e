"""What the grouped kernels share: the walk over tiles, products of tiles, and the launch options of both.

A row tile holds ``block_m`` rows of one expert; the rows' blocks are a multiple of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import GATED, PLAIN
from ..metadata import Blocks
from ..tiles import BLOCK_M, DTYPES, Arch, Tile, arch_of, gradient_tile, tile


@triton.jit
def walk(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles pass over the columns together.

    Their expert's weights and their rows are then in the L2 cache when the next tile asks for them.
    """
    in_group = GROUP * column_tiles
    first = program // in_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    inside = program % in_group
    return first + inside % size, inside // size


@triton.jit
def multiply(left, right, sums, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """sums + left @ right in fp32; the right is cast to the left's type. UPCAST is for the interpreter."""
    right = right.to(left.dtype)
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION)


@triton.jit
def row_product(left, left_row, left_mask, left_stride, right, right_depth, right_column, columns, width,
                depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """left[left_row] @ right[:, columns] in fp32; row and column indices are int64."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    left_at = left + left_row[:, None] * left_stride + k[None, :]
    right_at = right + k[:, None] * right_depth + columns[None, :] * right_column
    right_step = tl.full([], BLOCK_K, tl.int64) * right_depth
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        open_k = k < depth - first
        a = tl.load(left_at, mask=left_mask[:, None] & open_k[None, :], other=0.0)
        b = tl.load(right_at, mask=open_k[:, None] & (columns < width)[None, :], other=0.0)
        sums = multiply(a, b, sums, PRECISION, UPCAST)
        left_at += BLOCK_K
        right_at += right_step
    return sums


@dataclass(frozen=True)
class Launch:
    """A tile and what follows from it, the rows' blocks and the device."""

    tile: Tile
    constants: dict[str, object]
    sub: int  # row tiles of a block

    def row_tiles(self, meta: Blocks) -> int:
        """Row tiles, those of blocks behind the last included."""
        return meta.block_expert_B.shape[0] * self.sub

    @property
    def options(self) -> dict[str, int]:
        """How the kernel is launched."""
        return {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages}


def row_launch(
    arch: Arch,
    dtype: torch.dtype,
    block: int,
    columns: int,
    depth: int,
    accumulators: int = 1,
    tf32: bool = False,
) -> Launch:
    """The launch of a product of rows in blocks of ``block``; the block stands for the mean rows."""
    found = tile(arch, dtype, block, columns, depth, accumulators, tf32)
    sub = block // found.block_m
    return Launch(found, _constants(arch, dtype, found, tf32) | {"SUB": sub}, sub)


def gradient_launch(
    arch: Arch, dtype: torch.dtype, block: int, depth: int, columns: int, tf32: bool = False
) -> Launch:
    """The launch of a product over the rows of blocks of ``block``."""
    found = gradient_tile(arch, dtype, block, depth, columns, tf32)
    return Launch(found, _constants(arch, dtype, found, tf32) | {"BLOCK": block}, 1)


def _constants(arch: Arch, dtype: torch.dtype, found: Tile, tf32: bool) -> dict[str, object]:
    return {
        "BLOCK_M": found.block_m,
        "BLOCK_N": found.block_n,
        "BLOCK_K": found.block_k,
        "GROUP": found.group,
        "PRECISION": "tf32" if tf32 else "ieee",
        "UPCAST": arch.interpreted and dtype is torch.bfloat16,
    }


def activation_cases() -> list[tuple[torch.dtype, int, str, bool]]:
    """(type, block, activation, tf32) to compile: each activation, a gated and a plain one at each tile."""
    cases = [(torch.bfloat16, 128, name, False) for name in GATED + PLAIN]
    return cases + [
        (dtype, block, name, tf32)
        for dtype, tf32 in precisions()
        for block in BLOCK_M
        for name in ("swiglu", "relu2")
        if (dtype, block) != (torch.bfloat16, 128)
    ]


def precisions() -> list[tuple[torch.dtype, bool]]:
    """(type, tf32) of the products there are."""
    return [*((dtype, False) for dtype in DTYPES), (torch.float32, True)]


def arch_for(*tensors: Tensor) -> Arch:
    """The architecture of the device that all of them are on; ValueError if they are on several."""
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"operands are on {' and '.join(sorted(map(str, devices)))}; kernels take one device"
        )
    return arch_of(tensors[0].device)

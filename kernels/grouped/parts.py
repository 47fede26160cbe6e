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
from ..descriptors import Operand, described
from ..metadata import Blocks
from ..tiles import BLOCK_M, DTYPES, Arch, Tile, arch_of, gradient_tile, tile


@triton.jit
def walk(at, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of the tile ``at``: GROUP row tiles pass over the columns together.

    Their expert's weights and their rows are then in the L2 cache when the next tile asks for them.
    """
    in_group = GROUP * column_tiles
    first = at // in_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    inside = at % in_group
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
def used_row_tiles(block_starts, experts, SUB: tl.constexpr):
    """Row tiles of the blocks that have an expert, as the device has counted them."""
    return tl.load(block_starts + experts).to(tl.int32) * SUB


@triton.jit
def turns_of(tiles):
    """How many of the tiles this program computes, where it takes every ``num_programs``-th."""
    return tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0))


@triton.jit
def used(expert, size):
    """A tile's depth or width: 0, to compute nothing, behind the last used block, whose expert is -1."""
    return tl.where(expert < 0, 0, size)


@triton.jit
def has_no_expert(block_expert, row_tiles, column_tiles, SUB: tl.constexpr, GROUP: tl.constexpr):
    """Whether this program's first tile lies behind the last used block."""
    row_tile, _ = walk(tl.program_id(0), row_tiles, column_tiles, GROUP)
    return tl.load(block_expert + row_tile // SUB) < 0


@triton.jit
def matrix_tile(w, expert, first, column, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, TURNED: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of an expert's matrix by its descriptor, that of the transposed one if TURNED."""
    if TURNED:
        found = w.load([expert.to(tl.int32), column, first]).reshape(BLOCK_N, BLOCK_K).trans()
    else:
        found = w.load([expert.to(tl.int32), first, column]).reshape(BLOCK_K, BLOCK_N)
    return found


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


@triton.jit
def described_product(left, first_row, right, expert, first_column, depth, BLOCK_M: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
                      UPCAST: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """The same of BLOCK_M rows and BLOCK_N columns from the first on, by descriptors of both operands."""
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        a = left.load([first_row, first])
        b = matrix_tile(right, expert, first, first_column, BLOCK_K, BLOCK_N, TURNED)
        sums = multiply(a, b, sums, PRECISION, UPCAST)
    return sums


@dataclass(frozen=True)
class Launch:
    """A tile and what follows from it, the rows' blocks and the device."""

    tile: Tile
    constants: dict[str, object]
    sub: int  # row tiles of a block
    processors: int

    def row_tiles(self, meta: Blocks) -> int:
        """Row tiles, those of blocks behind the last included."""
        return meta.block_expert_B.shape[0] * self.sub

    def persistent(self, is_described: bool) -> bool:
        """Whether a program computes tile after tile; those that hold pointers meanwhile spill registers."""
        return self.tile.persistent and is_described

    def programs(self, meta: Blocks, columns: int, is_described: bool) -> int:
        """Programs for all rows by so many columns: one a tile, or, persistent, one a multiprocessor."""
        tiles = self.row_tiles(meta) * int(triton.cdiv(columns, self.tile.block_n))
        return min(tiles, self.processors) if self.persistent(is_described) else tiles

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
    products: int | None = None,
) -> Launch:
    """The launch of a product of rows in blocks of ``block``; the block stands for the mean rows."""
    found = tile(arch, dtype, block, columns, depth, accumulators, tf32, products)
    sub = block // found.block_m
    return Launch(found, _constants(arch, dtype, found, tf32) | {"SUB": sub}, sub, arch.processors)


def gradient_launch(
    arch: Arch, dtype: torch.dtype, block: int, depth: int, columns: int, tf32: bool = False
) -> Launch:
    """The launch of a product over the rows of blocks of ``block``."""
    found = gradient_tile(arch, dtype, block, depth, columns, tf32)
    return Launch(found, _constants(arch, dtype, found, tf32) | {"BLOCK": block}, 1, arch.processors)


def _constants(arch: Arch, dtype: torch.dtype, found: Tile, tf32: bool) -> dict[str, object]:
    return {
        "BLOCK_M": found.block_m,
        "BLOCK_N": found.block_n,
        "BLOCK_K": found.block_k,
        "GROUP": found.group,
        "PRECISION": "tf32" if tf32 else "ieee",
        "UPCAST": arch.interpreted and dtype is torch.bfloat16,
    }


def matrices(
    size: Tile, w_EKN: Tensor, dtype: torch.dtype, start: int = 0
) -> tuple[Operand, dict[str, bool]]:
    """The experts' matrices, by a descriptor if the tile wants one and they take it, and the :func:`form`.

    The descriptor is of [E, N, K], turned, where K is the contiguous dimension. Tiles may start at ``start``
    columns more than multiples of their width.
    """
    found, turned = None, w_EKN.stride(2) != 1
    if size.descriptors and turned:
        found = described(w_EKN.transpose(1, 2), (1, size.block_n, size.block_k), dtype)
    elif size.descriptors:
        found = described(w_EKN, (1, size.block_k, size.block_n), dtype, start)
    return w_EKN if found is None else found, form(found is not None, turned)


def form(is_described: bool, turned: bool = False) -> dict[str, bool]:
    """The constants of a kernel that reads matrices by a descriptor, or else by pointers."""
    return {"DESCRIBED": is_described, "TURNED": is_described and turned}


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


def forms(size: Tile, turned: bool = False) -> list[tuple[str, dict[str, bool]]]:
    """(words for a specimen's name, constants) of each form that a kernel has at a tile."""
    found = [("", form(False))]
    return [*found, (" by descriptors", form(True, turned))] if size.descriptors else found


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

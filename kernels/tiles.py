"""Tiles of products by architecture, element type, width and mean rows an expert; token counts play no part.

A tile is [block_m rows of one expert, block_n columns], computed ``block_k`` of the depth at a time.
Architectures are data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_M = (16, 32, 64, 128)
_STEP_BYTES = 128  # of the depth, one line of shared memory and of the L2 cache


@dataclass(frozen=True)
class Arch:
    """What bounds a tile. ``shared`` is the bytes of shared memory (LDS) that one block may have.

    ``wide`` is the largest number of accumulators of a tile (rows x columns, all products together) in 16-bit
    types and tf32, ``stages`` the copies of the operands in flight, and ``group`` the number of row blocks
    that share a column of tiles in the L2 cache. ``processors`` is the number of multiprocessors (compute
    units), ``persistent`` whether each computes tile after tile where it has room for one only, and
    ``descriptors`` whether operands may be read by tensor descriptors (TMA). ``interpreted`` stands for
    Triton's interpreter.
    """

    name: str
    backend: str
    target: int | str
    warp_size: int
    shared: int
    wide: int
    stages: int
    group: int
    processors: int
    persistent: bool = False
    descriptors: bool = False
    interpreted: bool = False


_KB = 1024
ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Arch("sm_80", "cuda", 80, 32, 163 * _KB, 128 * 128, 4, 8, 108),
        Arch("sm_89", "cuda", 89, 32, 99 * _KB, 128 * 128, 3, 8, 142),
        Arch("sm_90", "cuda", 90, 32, 227 * _KB, 128 * 256, 4, 8, 132, persistent=True, descriptors=True),
        Arch("sm_100", "cuda", 100, 32, 227 * _KB, 128 * 256, 4, 8, 148, persistent=True, descriptors=True),
        Arch("sm_120", "cuda", 120, 32, 99 * _KB, 128 * 128, 3, 8, 170),
        Arch("gfx942", "hip", "gfx942", 64, 64 * _KB, 128 * 128, 2, 4, 304),
    )
}
INTERPRETER = Arch(
    "interpreter", "cpu", "cpu", 32, 1 << 30, 16 * 16, 1, 2, 3, persistent=True, descriptors=True,
    interpreted=True,
)  # fmt: skip
_BY_CAPABILITY = {
    (8, 0): "sm_80", (8, 7): "sm_80", (8, 6): "sm_89", (8, 9): "sm_89", (9, 0): "sm_90", (10, 0): "sm_100",
    (10, 3): "sm_100", (11, 0): "sm_100", (12, 0): "sm_120", (12, 1): "sm_120",
}  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """[block_m, block_n] of a product, block_k of its depth a step, and how it is launched.

    ``persistent``: one program for each multiprocessor, which computes tiles until there are none.
    ``descriptors``: contiguous operands are read by tensor descriptors, where these take them.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int
    persistent: bool = False
    descriptors: bool = False


def arch_of(device: torch.device) -> Arch:
    """The architecture of a device; a CPU's is the interpreter's, whose tiles are small.

    Raises ValueError for an NVIDIA GPU before compute capability 8.0 and for a device without Triton.
    """
    if device.type == "cpu":
        return INTERPRETER
    if device.type != "cuda":
        raise ValueError(f"kernels run on NVIDIA and AMD GPUs, not on {device.type}")
    props = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = str(props.gcnArchName).partition(":")[0]
        found = replace(ARCHITECTURES["gfx942"], name=name, target=name, warp_size=props.warp_size)
    else:
        found = of_capability(props.major, props.minor)
    return replace(found, processors=props.multi_processor_count)


def of_capability(major: int, minor: int) -> Arch:
    """The architecture of a compute capability; one not listed is taken for that with the least memory.

    Raises ValueError before 8.0, which has no products of bf16.
    """
    if major < 8:
        raise ValueError(f"kernels need compute capability 8.0 or later, the device has {major}.{minor}")
    return ARCHITECTURES[_BY_CAPABILITY.get((major, minor), "sm_89")]


def block_m(arch: Arch, dtype: torch.dtype, mean_rows: float, tf32: bool = False) -> int:
    """Rows of a tile on ``arch``: :func:`rows_of_tile`, 16 in Triton's interpreter."""
    return 16 if arch.interpreted else rows_of_tile(dtype, mean_rows, tf32)


def rows_of_tile(dtype: torch.dtype, mean_rows: float, tf32: bool = False) -> int:
    """Rows of a tile, to which experts' rows are aligned: the least power of two that holds the mean rows.

    16 at least; at most 128, and 64 in exact fp32.
    """
    most = 128 if _on_tensor_cores(dtype, tf32) else 64
    return next((rows for rows in BLOCK_M if mean_rows <= rows and rows <= most), most)


def tile(
    arch: Arch,
    dtype: torch.dtype,
    mean_rows: float,
    columns: int,
    depth: int,
    accumulators: int = 1,
    tf32: bool = False,
    products: int | None = None,
) -> Tile:
    """The tile of [rows of an expert, depth] @ [depth, columns].

    ``accumulators`` is the number of products of one tile of rows (gate and up: 2), each ``block_n`` wide;
    ``products`` is the number that is computed, where a tile only leaves room for so many. Raises ValueError
    for a type without kernels.
    """
    rows = block_m(arch, dtype, mean_rows, tf32)
    found = _tile(arch, dtype, rows, columns, depth, accumulators, tf32)
    alone = 2 * shared_bytes(found, dtype, products or accumulators) > arch.shared or arch.interpreted
    return replace(found, persistent=arch.persistent and alone)


def gradient_tile(
    arch: Arch, dtype: torch.dtype, mean_rows: float, depth: int, columns: int, tf32: bool = False
) -> Tile:
    """The tile of a weight's gradient [depth, rows of an expert] @ [rows of an expert, columns].

    ``block_k`` counts an expert's rows here, and divides ``block_m(...)`` of the same mean rows, so that a
    step stays inside one block of rows.
    """
    height = min(block_m(arch, dtype, BLOCK_M[-1], tf32), _power_of_two(depth))
    return _tile(arch, dtype, height, columns, block_m(arch, dtype, mean_rows, tf32), 1, tf32)


def shared_bytes(found: Tile, dtype: torch.dtype, accumulators: int = 1) -> int:
    """An upper bound of the shared memory of a tile: the operands in flight, or the tile as it is written."""
    depth = found.block_m + accumulators * found.block_n
    operands = found.num_stages * depth * found.block_k * dtype.itemsize
    return max(operands, found.block_m * found.block_n * 4)


def _tile(
    arch: Arch, dtype: torch.dtype, rows: int, columns: int, depth: int, accumulators: int, tf32: bool
) -> Tile:
    if dtype not in DTYPES:
        raise ValueError(f"kernels take bf16, fp16 and fp32, not {str(dtype).removeprefix('torch.')}")
    fast = _on_tensor_cores(dtype, tf32)
    if arch.interpreted:
        return Tile(rows, 16, 16, arch.group, 1, 1, descriptors=arch.descriptors)
    # Exact fp32 has no tensor cores: each thread holds its rows and columns of a whole step in registers.
    # tf32 is made of fp32 in registers.
    room = arch.wide if dtype.itemsize == 2 else min(arch.wide, 128 * 128) if fast else 64 * 64
    widest = 256 if room > 128 * 128 else 128 if fast else 64
    wide = min(widest // accumulators, room // (rows * accumulators))
    block_n = max(16, min(wide, _power_of_two(columns)))
    block_k = min(_STEP_BYTES // dtype.itemsize if fast else 16, _power_of_two(depth))
    held = rows * block_n * accumulators // (4 * arch.warp_size)  # by each thread of four warps
    warps = 8 if held > (64 if dtype.itemsize == 2 else 32) else 4
    found = Tile(rows, block_n, block_k, arch.group, warps, 1, descriptors=arch.descriptors and fast)
    staged = [replace(found, num_stages=stages) for stages in range(1, arch.stages + 1)]
    return [each for each in staged if shared_bytes(each, dtype, accumulators) <= arch.shared][-1]


def _on_tensor_cores(dtype: torch.dtype, tf32: bool) -> bool:
    return dtype is not torch.float32 or tf32


def _power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``, 16 at least."""
    return max(16, 1 << max(n - 1, 0).bit_length())

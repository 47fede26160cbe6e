"""The least time of an MoE layer's products on a device, by arithmetic, memory, padding and the last wave.

Shapes: T tokens, D model, F hidden, E experts, k experts a token, N = T k rows; swiglu. Nothing here was
measured: peaks are the makers' figures for dense products, and the result is a bound, not a forecast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peers import PUBLISHED, Shape

from moetrain.kernels.tiles import ARCHITECTURES, Arch, Tile, tile


@dataclass(frozen=True)
class Device:
    """Dense bf16 peak in TFLOP/s, and memory in GB/s."""

    name: str
    tflops: float
    gb_per_s: float


DEVICES = {
    "sm_80": Device("A100 SXM 80 GB", 312, 2039),
    "sm_89": Device("L40S", 362, 864),
    "sm_90": Device("H100 SXM", 989, 3350),
    "sm_100": Device("B200", 2250, 8000),
    "sm_120": Device("RTX 5090", 209.5, 1792),
    "gfx942": Device("MI300X", 1307, 5300),
}


@dataclass(frozen=True)
class Bound:
    """Milliseconds of one product by what bounds it, and the TFLOP/s of useful work that are left."""

    arch: str
    device: str
    shape: str
    product: str
    tile: Tile
    flops: float
    arithmetic_ms: float
    memory_ms: float
    padding: float
    last_wave: float
    tflops: float


def tile_work(found: Tile, itemsize: int, accumulators: int = 1) -> tuple[int, int]:
    """(FLOPs, bytes loaded) of one step of a tile's depth."""
    flops = 2 * found.block_m * found.block_n * found.block_k * accumulators
    return flops, (found.block_m + accumulators * found.block_n) * found.block_k * itemsize


def bounds(dtype: torch.dtype = torch.bfloat16) -> Iterator[Bound]:
    """The forward products of each published shape on each device: up with gate and activation, and down."""
    for arch in ARCHITECTURES.values():
        for name, s in PUBLISHED.items():
            yield _bound(arch, name, s, "up", 2, s.d_ff, s.d_model, dtype)
            yield _bound(arch, name, s, "down", 1, s.d_model, s.d_ff, dtype)


def _bound(
    arch: Arch,
    name: str,
    s: Shape,
    product: str,
    accumulators: int,
    columns: int,
    depth: int,
    dtype: torch.dtype,
) -> Bound:
    """``padding`` and ``last_wave`` are the shares of arithmetic that remain for useful rows and full waves.

    An expert's last block of rows is taken to be half empty. Operands and results cross memory once, with the
    pre-activation beside the activation; one block a multiprocessor runs at a time.
    """
    device, rows = DEVICES[arch.name], s.tokens * s.top_k
    found = tile(arch, dtype, rows / s.experts, columns, depth, accumulators)
    flops = 2.0 * rows * columns * depth * accumulators
    written = rows * columns * (accumulators + 1 if accumulators > 1 else 1)
    moved = (rows * depth + s.experts * depth * columns * accumulators + written) * dtype.itemsize
    blocks = rows / found.block_m + s.experts / 2
    tiles = blocks * -(-columns // found.block_n)
    waves = tiles / arch.processors
    padding, last_wave = rows / (blocks * found.block_m), waves / -(-waves // 1)
    arithmetic = flops / (device.tflops * 1e12) * 1e3
    memory = moved / (device.gb_per_s * 1e9) * 1e3
    least = max(arithmetic / (padding * last_wave), memory)
    return Bound(
        arch.name, device.name, name, product, found, flops, arithmetic, memory, padding, last_wave,
        flops / least / 1e9,
    )  # fmt: skip

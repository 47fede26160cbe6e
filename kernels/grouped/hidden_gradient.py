"""The gradient of the hidden rows, with the activation's backward, the routing weight's gradient and h anew.

Shapes: X source rows, D depth, E experts, F hidden, P = 2F (gate, then up) or F, R block-aligned rows,
C column tiles of F.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import activate, activate_backward, is_gated
from ..metadata import Blocks
from ..specimen import Specimen, pointer
from ..tiles import Arch
from .parts import activation_cases, arch_for, row_launch, row_product, walk


def hidden_gradient(
    dout: Tensor,
    meta: Blocks,
    weights_R: Tensor,
    w_down_EFD: Tensor,
    z_RP: Tensor,
    activation: str,
    dz_RP: Tensor,
    h_RF: Tensor,
    gathered: bool,
    tf32: bool = False,
) -> Tensor:
    """Write dz and the weighted hidden rows; return dweights [R], which is 0 on padding and behind the last.

    ``dout`` has a row for each computed row, or, ``gathered``, one for each source row. dweights is an inner
    product over F, fp32, summed over tiles of F in a second pass in their order.
    """
    gated = is_gated(activation)
    _, hidden, depth = w_down_EFD.shape
    arch = arch_for(dout, w_down_EFD, weights_R, z_RP, meta.ids_R)
    launch = row_launch(arch, dout.dtype, meta.block, hidden, depth, _held(activation), tf32)
    row_tiles, column_tiles = launch.row_tiles(meta), triton.cdiv(hidden, launch.tile.block_n)
    rows = meta.ids_R.shape[0]
    parts_CR = torch.empty(column_tiles, rows, dtype=torch.float32, device=dout.device)
    dweights_R = torch.empty_like(weights_R)
    w_expert, w_hidden, w_depth = w_down_EFD.stride()
    hidden_gradient_kernel[(row_tiles * column_tiles,)](
        dout, meta.ids_R, weights_R, w_down_EFD, meta.block_expert_B, z_RP, dz_RP, h_RF, parts_CR, row_tiles,
        depth, hidden, dout.stride(0), w_expert, w_depth, w_hidden, z_RP.stride(0), dz_RP.stride(0),
        h_RF.stride(0), parts_CR.stride(0), NAME=activation, GATED=gated, GATHERED=gathered,
        **launch.constants, **launch.options,
    )  # fmt: skip
    sum_parts_kernel[(triton.cdiv(rows, 128),)](
        parts_CR, meta.ids_R, dweights_R, rows, parts_CR.stride(0), PARTS=column_tiles, BLOCK=128, num_warps=4
    )
    return dweights_R


def _held(activation: str) -> int:
    """Tiles in registers at once: dh, gate, up and the activated gate; clamps take more, and none spills."""
    return 8 if activation == "swiglu_clamped" else 4


@triton.jit(do_not_specialize=["row_tiles", "part_stride"])
def hidden_gradient_kernel(dout, ids, weights, w_down, block_expert, z, dz, h, parts, row_tiles, depth,
                           hidden, dout_stride, w_expert, w_depth, w_hidden, z_stride, dz_stride, h_stride,
                           part_stride, NAME: tl.constexpr, GATED: tl.constexpr, GATHERED: tl.constexpr,
                           SUB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                           BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
                           UPCAST: tl.constexpr):  # fmt: skip
    """One tile of rows by hidden columns."""
    row_tile, column_tile = walk(tl.program_id(0), row_tiles, tl.cdiv(hidden, BLOCK_N), GROUP)
    expert = tl.load(block_expert + row_tile // SUB).to(tl.int64)
    if expert < 0:
        return
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(ids + row)
    dout_row = row
    if GATHERED:
        dout_row = token
    dh = row_product(dout, dout_row, token >= 0, dout_stride, w_down + expert * w_expert, w_depth, w_hidden,
                     column, hidden, depth, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)  # fmt: skip

    inside = (column < hidden)[None, :]
    read = (token >= 0)[:, None] & inside
    to_up = tl.full([], 0, tl.int64) + hidden
    z_at = z + row[:, None] * z_stride + column[None, :]
    dz_at = dz + row[:, None] * dz_stride + column[None, :]
    if GATED:
        gate = tl.load(z_at, mask=read, other=0.0).to(tl.float32)
        up = tl.load(z_at + to_up, mask=read, other=0.0).to(tl.float32)
    else:
        up = tl.load(z_at, mask=read, other=0.0).to(tl.float32)
        gate = up
    value = activate(gate, up, NAME)
    tl.store(parts + column_tile.to(tl.int64) * part_stride + row, tl.sum(dh * value, axis=1))
    weight = tl.load(weights + row).to(tl.float32)[:, None]
    stored = h.dtype.element_ty
    tl.store(h + row[:, None] * h_stride + column[None, :], (value * weight).to(stored), mask=inside)
    dgate, dup = activate_backward(dh * weight, gate, up, NAME)
    if GATED:
        tl.store(dz_at, dgate.to(stored), mask=inside)
        dz_at += to_up
    tl.store(dz_at, dup.to(stored), mask=inside)


@triton.jit(do_not_specialize=["rows", "part_stride"])
def sum_parts_kernel(parts, ids, out, rows, part_stride, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out[r] = the sum of parts[:, r] in their order, 0 where the row has no source."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = tl.load(ids + row, mask=row < rows, other=-1) >= 0
    sums = tl.zeros([BLOCK], tl.float32)
    for part in range(PARTS):
        sums += tl.load(parts + (tl.full([], 0, tl.int64) + part) * part_stride + row, mask=used, other=0.0)
    tl.store(out + row, sums.to(out.dtype.element_ty), mask=row < rows)


def specimens(arch: Arch, depth: int = 2048, hidden: int = 768) -> list[Specimen]:
    """Every activation at one tile, and every tile of swiglu and relu2 with its precision."""
    found = [_specimen(arch, *case, depth, hidden) for case in activation_cases()]
    signature = {"parts": "*fp32", "ids": "*i64", "out": "*fp32", "rows": "i32", "part_stride": "i32"}
    constants = {"PARTS": 12, "BLOCK": 128}
    return [*found, Specimen("sum parts", sum_parts_kernel, signature, constants, 4, 1, False)]


def _specimen(
    arch: Arch, dtype: torch.dtype, block: int, name: str, tf32: bool, depth: int, hidden: int
) -> Specimen:
    launch = row_launch(arch, dtype, block, hidden, depth, _held(name), tf32)
    kind = pointer(dtype)
    signature = dict.fromkeys(("dout", "w_down", "z", "dz", "h"), kind)
    signature |= {"ids": "*i64", "weights": "*fp32", "block_expert": "*i32", "parts": "*fp32"}
    sizes = ("row_tiles", "depth", "hidden", "dout_stride", "w_expert", "w_hidden")
    signature |= dict.fromkeys((*sizes, "z_stride", "dz_stride", "h_stride", "part_stride"), "i32")
    constants = {"NAME": name, "GATED": is_gated(name), "GATHERED": True, "w_depth": 1} | launch.constants
    label = f"hidden gradient {kind[1:]}{' tf32' if tf32 else ''} {name} {block} rows"
    products = dtype is not torch.float32 or tf32
    return Specimen(
        label, hidden_gradient_kernel, signature, constants, **launch.options, products=products,
        tile=launch.tile,
    )  # fmt: skip

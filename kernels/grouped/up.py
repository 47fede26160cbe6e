"""The up projection with its gather, activation and routing weight: pre-activation and hidden rows at once.

Shapes: X source rows, D depth, E experts, F hidden, P = 2F (gate, then up) or F, R block-aligned rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import activate, is_gated
from ..metadata import Blocks
from ..specimen import Specimen, pointer
from ..tiles import Arch
from .parts import activation_cases, arch_for, multiply, row_launch, walk


def up(
    source_XD: Tensor,
    meta: Blocks,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    activation: str,
    z_RP: Tensor | None,
    h_RF: Tensor | None,
    tf32: bool = False,
) -> None:
    """Write ``source[ids] @ w_up[e]`` to ``z_RP``, its activation times the routing weight to ``h_RF``.

    Either may be None. The activation is that of the pre-activation as it is stored, so that a backward pass
    computes the same one anew. Rows behind the last used block are not written.
    """
    gated = is_gated(activation)
    depth = w_up_EDP.shape[1]
    hidden = w_up_EDP.shape[2] // (2 if gated else 1)
    arch = arch_for(source_XD, w_up_EDP, weights_R, meta.ids_R)
    launch = row_launch(arch, source_XD.dtype, meta.block, hidden, depth, _accumulators(activation), tf32)
    row_tiles = launch.row_tiles(meta)
    grid = (row_tiles * triton.cdiv(hidden, launch.tile.block_n),)
    up_kernel[grid](
        source_XD, meta.ids_R, weights_R, w_up_EDP, meta.block_expert_B, z_RP, h_RF, row_tiles, depth, hidden,
        source_XD.stride(0), *w_up_EDP.stride(), 0 if z_RP is None else z_RP.stride(0),
        0 if h_RF is None else h_RF.stride(0), NAME=activation, GATED=gated, **launch.constants,
        **launch.options,
    )  # fmt: skip


def _accumulators(activation: str) -> int:
    """Products that a tile has room for: a plain activation takes that of a second one, erf that of two."""
    return 4 if activation == "geglu" else 2


@triton.jit(do_not_specialize=["row_tiles"])
def up_kernel(source, ids, weights, w_up, block_expert, z, h, row_tiles, depth, hidden, source_stride,
              w_expert, w_depth, w_column, z_stride, h_stride, NAME: tl.constexpr, GATED: tl.constexpr,
              SUB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
              GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One tile of rows by hidden columns; the gate's and the up's columns together where there are both."""
    row_tile, column_tile = walk(tl.program_id(0), row_tiles, tl.cdiv(hidden, BLOCK_N), GROUP)
    expert = tl.load(block_expert + row_tile // SUB).to(tl.int64)
    if expert < 0:
        return
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(ids + row)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_at = source + token[:, None] * source_stride + k[None, :]
    w_at = w_up + expert * w_expert + k[:, None] * w_depth + column[None, :] * w_column
    w_step = tl.full([], BLOCK_K, tl.int64) * w_depth
    to_up = tl.full([], 0, tl.int64) + hidden
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        open_k = k < depth - first
        inside = open_k[:, None] & (column < hidden)[None, :]
        x = tl.load(x_at, mask=(token >= 0)[:, None] & open_k[None, :], other=0.0)
        if GATED:
            gate = multiply(x, tl.load(w_at, mask=inside, other=0.0), gate, PRECISION, UPCAST)
            up_w = tl.load(w_at + to_up * w_column, mask=inside, other=0.0)
        else:
            up_w = tl.load(w_at, mask=inside, other=0.0)
        up = multiply(x, up_w, up, PRECISION, UPCAST)
        x_at += BLOCK_K
        w_at += w_step

    inside = (column < hidden)[None, :]
    stored = source.dtype.element_ty
    gate, up = gate.to(stored), up.to(stored)
    if z is not None:
        z_at = z + row[:, None] * z_stride + column[None, :]
        if GATED:
            tl.store(z_at, gate, mask=inside)
            z_at += to_up
        tl.store(z_at, up, mask=inside)
    if h is not None:
        hidden_rows = activate(gate.to(tl.float32), up.to(tl.float32), NAME)
        hidden_rows = hidden_rows * tl.load(weights + row).to(tl.float32)[:, None]
        hidden_rows = tl.where((token >= 0)[:, None], hidden_rows, 0.0)
        tl.store(h + row[:, None] * h_stride + column[None, :], hidden_rows.to(stored), mask=inside)


def specimens(arch: Arch, depth: int = 2048, hidden: int = 768) -> list[Specimen]:
    """Every activation at one tile, every tile of swiglu and relu2 with its precision, and without z or h."""
    found = [_specimen(arch, *case, depth, hidden) for case in activation_cases()]
    alone = (_specimen(arch, torch.bfloat16, 128, "swiglu", False, depth, hidden, out) for out in ("z", "h"))
    return [*found, *alone]


def _specimen(
    arch: Arch,
    dtype: torch.dtype,
    block: int,
    name: str,
    tf32: bool,
    depth: int,
    hidden: int,
    without: str | None = None,
) -> Specimen:
    launch = row_launch(arch, dtype, block, hidden, depth, _accumulators(name), tf32)
    kind = pointer(dtype)
    signature = dict.fromkeys(("source", "w_up", "z", "h"), kind)
    signature |= {"ids": "*i64", "weights": "*fp32", "block_expert": "*i32"}
    sizes = ("row_tiles", "depth", "hidden", "source_stride", "w_expert", "w_depth", "z_stride", "h_stride")
    signature |= dict.fromkeys(sizes, "i32")
    constants = {"NAME": name, "GATED": is_gated(name), "w_column": 1} | launch.constants
    label = f"up {kind[1:]}{' tf32' if tf32 else ''} {name} {block} rows"
    if without is not None:
        del signature[without]
        constants[without] = None
        label += f", no {without}"
    products = dtype is not torch.float32 or tf32
    return Specimen(
        label, up_kernel, signature, constants, **launch.options, products=products, tile=launch.tile,
        accumulators=2 if is_gated(name) else 1,
    )  # fmt: skip

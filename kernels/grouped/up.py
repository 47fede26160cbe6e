"""The up projection with its gather, activation and routing weight: pre-activation and hidden rows at once.

Shapes: X source rows, D depth, E experts, F hidden, P = 2F (gate, then up) or F, R block-aligned rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import activate, is_gated
from ..descriptors import descriptor
from ..metadata import Blocks
from ..specimen import Specimen, pointer
from ..tiles import Arch
from .parts import (
    Launch,
    activation_cases,
    arch_for,
    forms,
    has_no_expert,
    matrices,
    matrix_tile,
    multiply,
    row_launch,
    turns_of,
    used,
    used_row_tiles,
    walk,
)


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
    launch = _launch(arch, source_XD.dtype, meta.block, hidden, depth, activation, tf32)
    w_up, flags = matrices(launch.tile, w_up_EDP, source_XD.dtype, start=hidden if gated else 0)
    up_kernel[(launch.programs(meta, hidden, flags["DESCRIBED"]),)](
        source_XD, meta.ids_R, weights_R, w_up, meta.block_expert_B, meta.block_starts_E1, z_RP, h_RF,
        launch.row_tiles(meta), w_up_EDP.shape[0], depth, hidden, source_XD.stride(0), *w_up_EDP.stride(),
        0 if z_RP is None else z_RP.stride(0), 0 if h_RF is None else h_RF.stride(0), NAME=activation,
        GATED=gated, PERSISTENT=launch.persistent(flags["DESCRIBED"]), **flags, **launch.constants,
        **launch.options,
    )  # fmt: skip


def _launch(
    arch: Arch, dtype: torch.dtype, block: int, hidden: int, depth: int, activation: str, tf32: bool
) -> Launch:
    """With room for two products, as gate and up are, or for four where registers spilled with two."""
    gated = is_gated(activation)
    room = 4 if activation in ("geglu", "geglu_tanh", "swiglu_clamped") or (tf32 and not gated) else 2
    return row_launch(arch, dtype, block, hidden, depth, room, tf32, products=2 if gated else 1)


@triton.jit(do_not_specialize=["row_tiles", "experts"])
def up_kernel(source, ids, weights, w_up, block_expert, block_starts, z, h, row_tiles, experts, depth, hidden,
              source_stride, w_expert, w_depth, w_column, z_stride, h_stride, NAME: tl.constexpr,
              GATED: tl.constexpr, SUB: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
              DESCRIBED: tl.constexpr, TURNED: tl.constexpr, PERSISTENT: tl.constexpr):  # fmt: skip
    """A tile of rows by hidden columns, or, PERSISTENT, every one of this program.

    The gate's and the up's columns are computed together where there are both.
    """
    column_tiles = tl.cdiv(hidden, BLOCK_N)
    turns = 1
    if PERSISTENT:
        row_tiles = used_row_tiles(block_starts, experts, SUB)
        turns = turns_of(row_tiles * column_tiles)
    elif has_no_expert(block_expert, row_tiles, column_tiles, SUB, GROUP):
        return  # a loop of no steps, as in product.py, makes some tiles of this kernel spill
    at = tl.program_id(0)
    for _ in range(turns):
        row_tile, column_tile = walk(at, row_tiles, column_tiles, GROUP)
        expert = tl.load(block_expert + row_tile // SUB).to(tl.int64)
        deep, wide = depth, hidden
        if PERSISTENT:  # every block is used; without this, masks are kept from tile to tile, and spill
            deep, wide = used(expert, depth), used(expert, hidden)
        row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        column = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.load(ids + row)
        gate, up = _pre_activation(
            source, token, source_stride, w_up, expert, w_expert, w_depth, w_column, column_tile * BLOCK_N,
            wide, deep, GATED, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST, DESCRIBED,
            TURNED,
        )  # fmt: skip
        inside = (column < wide)[None, :]
        stored = source.dtype.element_ty
        gate, up = gate.to(stored), up.to(stored)
        if z is not None:
            z_at = z + row[:, None] * z_stride + column[None, :]
            if GATED:
                tl.store(z_at, gate, mask=inside)
                z_at += tl.full([], 0, tl.int64) + hidden
            tl.store(z_at, up, mask=inside)
        if h is not None:
            hidden_rows = activate(gate.to(tl.float32), up.to(tl.float32), NAME)
            hidden_rows = hidden_rows * tl.load(weights + row).to(tl.float32)[:, None]
            hidden_rows = tl.where((token >= 0)[:, None], hidden_rows, 0.0)
            tl.store(h + row[:, None] * h_stride + column[None, :], hidden_rows.to(stored), mask=inside)
        at += tl.num_programs(0)


@triton.jit
def _pre_activation(source, token, source_stride, w_up, expert, w_expert, w_depth, w_column, first_column,
                    hidden, depth, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
                    DESCRIBED: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """(gate, up) in fp32, the gate 0 where there is none. Columns behind the last are of no account."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    column = first_column.to(tl.int64) + tl.arange(0, BLOCK_N)
    x_at = source + token[:, None] * source_stride + k[None, :]
    if not DESCRIBED:
        w_at = w_up + expert * w_expert + k[:, None] * w_depth + column[None, :] * w_column
        w_step = tl.full([], BLOCK_K, tl.int64) * w_depth
        to_up = (tl.full([], 0, tl.int64) + hidden) * w_column
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        open_k = k < depth - first
        x = tl.load(x_at, mask=(token >= 0)[:, None] & open_k[None, :], other=0.0)
        if DESCRIBED:
            if GATED:
                gate_w = matrix_tile(w_up, expert, first, first_column, BLOCK_K, BLOCK_N, TURNED)
                up_w = matrix_tile(w_up, expert, first, first_column + hidden, BLOCK_K, BLOCK_N, TURNED)
            else:
                up_w = matrix_tile(w_up, expert, first, first_column, BLOCK_K, BLOCK_N, TURNED)
        else:
            inside = open_k[:, None] & (column < hidden)[None, :]
            if GATED:
                gate_w = tl.load(w_at, mask=inside, other=0.0)
                up_w = tl.load(w_at + to_up, mask=inside, other=0.0)
            else:
                up_w = tl.load(w_at, mask=inside, other=0.0)
            w_at += w_step
        if GATED:
            gate = multiply(x, gate_w, gate, PRECISION, UPCAST)
        up = multiply(x, up_w, up, PRECISION, UPCAST)
        x_at += BLOCK_K
    return gate, up


def specimens(arch: Arch, depth: int = 2048, hidden: int = 768) -> list[Specimen]:
    """Every activation at one tile, every tile of swiglu and relu2 with its precision, and without z or h."""
    found = [each for case in activation_cases() for each in _specimens(arch, *case, depth, hidden)]
    for without in ("z", "h"):
        found += _specimens(arch, torch.bfloat16, 128, "swiglu", False, depth, hidden, without)
    return found


def _specimens(
    arch: Arch,
    dtype: torch.dtype,
    block: int,
    name: str,
    tf32: bool,
    depth: int,
    hidden: int,
    without: str | None = None,
) -> list[Specimen]:
    launch = _launch(arch, dtype, block, hidden, depth, name, tf32)
    kind, size = pointer(dtype), launch.tile
    signature = dict.fromkeys(("source", "z", "h"), kind)
    signature |= {"ids": "*i64", "weights": "*fp32", "block_expert": "*i32", "block_starts": "*i64"}
    sizes = ("row_tiles", "experts", "depth", "hidden", "source_stride", "w_expert", "w_depth", "z_stride")
    signature |= dict.fromkeys((*sizes, "h_stride"), "i32")
    constants = {"NAME": name, "GATED": is_gated(name), "w_column": 1} | launch.constants
    label = f"up {kind[1:]}{' tf32' if tf32 else ''} {name} {block} rows"
    if without is not None:
        del signature[without]
        constants[without] = None
        label += f", no {without}"
    matrix = (kind, descriptor(dtype, 1, size.block_k, size.block_n))
    return [
        Specimen(
            label + words, up_kernel, signature | {"w_up": matrix[flags["DESCRIBED"]]},
            constants | flags | {"PERSISTENT": launch.persistent(flags["DESCRIBED"])}, **launch.options,
            products=dtype is not torch.float32 or tf32, tile=size,
            accumulators=2 if is_gated(name) else 1,
        )
        for words, flags in forms(size)
    ]  # fmt: skip

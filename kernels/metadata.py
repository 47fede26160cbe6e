"""The block-aligned rows of sorted assignments, made on the device: nothing waits for a count.

Each expert's rows fill whole blocks. The number of blocks is known by a bound only, ``cdiv(N, block) + E``;
the blocks behind the last used one belong to no expert. Order and meaning are those of the host's plan.

Shapes: T tokens, K choices a token, E experts, N assignments, X source rows, B blocks, R = B * block rows,
E1 = E + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sorting import MOST_BINS, ends, stable_order
from .specimen import Specimen, pointer
from .tiles import BLOCK_M, Arch


@dataclass(frozen=True)
class Blocks:
    """Which source row each computed row is, and which expert each block belongs to: all that products read.

    block           rows of a block.
    ids_R           int64, source row of each computed row; -1 for padding and behind the last block.
    block_starts_E1  int64, first block of each expert; the last entry is the number of used blocks.
    block_expert_B  int32, expert of each block; -1 behind the last.
    """

    block: int
    ids_R: Tensor
    block_starts_E1: Tensor
    block_expert_B: Tensor


@dataclass(frozen=True)
class Metadata(Blocks):
    """The way back as well.

    slots_N         int64, computed row of each assignment; -1 behind the last assignment.
    starts_E1       int64, first assignment of each expert; the last entry is their number.
    by_source_N     int64, computed rows grouped by their source row, in the experts' order; -1 behind the
                    last assignment. ``ends_X`` closes each source row's group.
    """

    slots_N: Tensor
    starts_E1: Tensor
    by_source_N: Tensor
    ends_X: Tensor


def sort_choices(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order [T K], counts [E]), int64: the choices sorted by (expert, token), and those of each expert.

    An id equal to ``num_experts`` stands for no expert: such choices come behind all others. The token of a
    choice is ``order // K``.
    """
    ids_M = ids_TK.reshape(-1)
    bins = max(32, triton.next_power_of_2(num_experts + 1))
    order_M = stable_order(ids_M, num_experts, bins=min(bins, MOST_BINS))
    ends_E = ends(ids_M, order_M, num_experts)
    return order_M, ends_E.diff(prepend=ends_E.new_zeros(1))


def lay_out(
    token_ids_N: Tensor, weights_N: Tensor, counts_E: Tensor, block: int, num_source: int
) -> tuple[Metadata, Tensor]:
    """The metadata of assignments sorted by (expert, token), and the weight of each computed row.

    ``counts_E`` of them go to each expert. ``token_ids_N`` are source rows, int64, below ``num_source``. N
    may be more than the sum of ``counts_E``: what lies behind is not read. Rows that are padding, or behind
    the last block, weigh 0. Raises ValueError for a block that no tile has.
    """
    if block not in BLOCK_M:
        raise ValueError(f"a block has {', '.join(map(str, BLOCK_M))} rows, not {block}")
    size, experts = token_ids_N.shape[0], counts_E.shape[0]
    blocks = triton.cdiv(size, block) + experts
    starts_E1, block_starts_E1 = counts_E.new_empty(experts + 1), counts_E.new_empty(experts + 1)
    wide = triton.next_power_of_2(experts)
    segments_kernel[(1,)](counts_E, starts_E1, block_starts_E1, experts, BLOCK=block, WIDE=wide, num_warps=4)
    ids_R, weights_R = token_ids_N.new_empty(blocks * block), weights_N.new_empty(blocks * block)
    slots_N = torch.full_like(token_ids_N, -1)
    block_expert_B = torch.empty(blocks, dtype=torch.int32, device=counts_E.device)
    rows_kernel[(blocks,)](
        token_ids_N, weights_N, starts_E1, block_starts_E1, ids_R, weights_R, slots_N, block_expert_B,
        experts, BLOCK=block, WIDE=wide, num_warps=4,
    )  # fmt: skip
    order_N = stable_order(token_ids_N, num_source, starts_E1[-1:])
    by_source_N = slots_N[order_N]
    ends_X = ends(ids_R, by_source_N, num_source)
    found = Metadata(block, ids_R, block_starts_E1, block_expert_B, slots_N, starts_E1, by_source_N, ends_X)
    return found, weights_R


@triton.jit(do_not_specialize=["experts"])
def segments_kernel(counts, starts, block_starts, experts, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The first assignment and the first block of each expert, and their numbers behind the last."""
    expert = tl.arange(0, WIDE)
    count = tl.load(counts + expert, mask=expert < experts, other=0)
    blocks = (count + BLOCK - 1) // BLOCK
    tl.store(starts, tl.zeros([], tl.int64))
    tl.store(block_starts, tl.zeros([], tl.int64))
    tl.store(starts + 1 + expert, tl.cumsum(count, axis=0), mask=expert < experts)
    tl.store(block_starts + 1 + expert, tl.cumsum(blocks, axis=0), mask=expert < experts)


@triton.jit(do_not_specialize=["experts"])
def rows_kernel(token_ids, weights, starts, block_starts, ids, row_weights, slots, block_expert, experts,
                BLOCK: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The rows of one block."""
    block = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, WIDE)
    behind = tl.load(block_starts + 1 + each, mask=each < experts, other=0) <= block
    expert = tl.sum((behind & (each < experts)).to(tl.int32), axis=0)
    used = expert < experts
    tl.store(block_expert + block, tl.where(used, expert, -1))
    at = tl.load(starts + expert) + tl.arange(0, BLOCK)
    at += (block - tl.load(block_starts + expert)) * BLOCK
    inside = at < tl.where(used, tl.load(starts + tl.minimum(expert + 1, experts)), 0)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(ids + rows, tl.load(token_ids + at, mask=inside, other=-1))
    tl.store(row_weights + rows, tl.load(weights + at, mask=inside, other=0.0))
    tl.store(slots + at, rows, mask=inside)


def specimens(arch: Arch) -> list[Specimen]:
    """The kernels for blocks of every size, with 512 experts and weights in fp32."""
    index, wide = pointer(torch.int64), {"WIDE": 512}
    segments = dict.fromkeys(("counts", "starts", "block_starts"), index) | {"experts": "i32"}
    rows = dict.fromkeys(("token_ids", "starts", "block_starts", "ids", "slots"), index)
    rows |= {"weights": "*fp32", "row_weights": "*fp32", "block_expert": "*i32", "experts": "i32"}
    return [
        Specimen(f"{name} {block} rows", kernel, signature, {"BLOCK": block} | wide, 4, 1, False)
        for block in BLOCK_M
        for name, kernel, signature in (("segments", segments_kernel, segments), ("rows", rows_kernel, rows))
    ]

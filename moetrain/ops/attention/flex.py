"""torch's FlexAttention: a kernel that skips blocks by a table, and evaluates a mask function in others.

The table is made of the least and largest document id of each block of 128 tokens, the window and the
order: (S / 128)^2 numbers, without a look at the ids by the host and without a mask of all pairs, which
torch's ``create_block_mask`` would make. A block counts as seen where its ids could meet those of the
queries, so that documents in any order are right, and those that follow one another skip all that can be.

Shapes: B batch (1 where all rows share it), S positions, n blocks of queries or keys, Q query heads, G key
and value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from moetrain.ops.attention.case import NO_SINKS, Case, Plan
from moetrain.ops.attention.seen_keys import SeenKeys

BLOCK = 128  # positions; what torch's kernels take
_DEVICES = ("cuda", "xpu")


def refusal(case: Case) -> str | None:
    if case.device.type not in _DEVICES:
        return (
            f"on a {case.device.type} device torch's FlexAttention has no backward kernel, and without a "
            "kernel it computes the scores of all pairs"
        )
    if case.sinks:
        return NO_SINKS
    if case.dtype is torch.float64:
        return "FlexAttention has no kernel for float64"
    return "FlexAttention's block mask counts from position 0: no cached keys" if case.cached else None


def worthwhile(case: Case) -> bool:
    return case.seen is not None


def prepare(case: Case) -> Plan:
    seen = case.seen or SeenKeys(case.seq)
    return Plan("flex", seen, block_mask=block_mask(seen, case.device))


def attend(
    q_BQSH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, plan: Plan, sinks_Q: Tensor | None = None
) -> Tensor:
    if sinks_Q is not None:
        raise ValueError(NO_SINKS)
    grouped = q_BQSH.shape[1] != k_BGKH.shape[1]
    y_BQSH = kernel()(q_BQSH, k_BGKH, v_BGKH, block_mask=plan.block_mask, enable_gqa=grouped)
    return y_BQSH.transpose(1, 2)


def kernel() -> Callable[..., Tensor]:
    """``flex_attention``, compiled here unless what calls it is being compiled."""
    plain: Callable[..., Any] = flex_attention  # its overloads return more than a tensor on request
    return plain if torch.compiler.is_compiling() else _compiled()


@cache
def _compiled() -> Callable[..., Tensor]:
    # In one graph: else a shape too many would go uncompiled, which makes the scores of all pairs.
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, fullgraph=True)
    return compiled


def block_mask(seen: SeenKeys, device: torch.device) -> BlockMask:
    """The blocks that hold a pair that ``seen`` allows, or may; and those whose pairs are all allowed."""
    if seen.cached:
        raise ValueError(f"{seen.cached} cached keys: a block mask counts from position 0")
    some_Bnn, all_Bnn = block_table(seen, device)
    partial = some_Bnn & ~all_Bnn
    keys, full_keys = _ordered(partial), _ordered(all_Bnn)
    queries, full_queries = _ordered(partial.transpose(1, 2)), _ordered(all_Bnn.transpose(1, 2))
    return BlockMask(
        seq_lengths=(seen.seq, seen.seq),
        kv_num_blocks=keys[0], kv_indices=keys[1],
        full_kv_num_blocks=full_keys[0], full_kv_indices=full_keys[1],
        q_num_blocks=queries[0], q_indices=queries[1],
        full_q_num_blocks=full_queries[0], full_q_indices=full_queries[1],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_pairs(seen.window, seen.doc_ids_BS),
    )  # fmt: skip


def block_table(seen: SeenKeys, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two of [B, n queries, n keys], bool: whether a pair of the block may be seen; whether all are."""
    blocks = -(-seen.seq // BLOCK)
    query_n1, key_n = torch.arange(blocks, device=device)[:, None], torch.arange(blocks, device=device)
    some_Bnn, all_Bnn = (key_n <= query_n1)[None], (key_n < query_n1)[None]
    if seen.seq % BLOCK:
        all_Bnn = all_Bnn & (query_n1 < blocks - 1)  # the last block reaches beyond the sequence
    if seen.window is not None:
        nearest_nn, farthest_nn = (query_n1 - key_n - 1) * BLOCK + 1, (query_n1 - key_n + 1) * BLOCK - 1
        some_Bnn, all_Bnn = some_Bnn & (nearest_nn < seen.window), all_Bnn & (farthest_nn < seen.window)
    if seen.doc_ids_BS is not None:
        places = torch.arange(blocks * BLOCK, device=device).clamp_(max=seen.seq - 1)
        ids_BnT = seen.doc_ids_BS[:, places].unflatten(1, (blocks, BLOCK))
        low_Bn, high_Bn = ids_BnT.aminmax(dim=2)
        meets_Bnn = (low_Bn[:, :, None] <= high_Bn[:, None]) & (low_Bn[:, None] <= high_Bn[:, :, None])
        single_Bn = low_Bn == high_Bn
        some_Bnn = some_Bnn & meets_Bnn
        all_Bnn = all_Bnn & meets_Bnn & single_Bn[:, :, None] & single_Bn[:, None]
    return some_Bnn, all_Bnn


def _ordered(table_Bnn: Tensor) -> tuple[Tensor, Tensor]:
    """([B, 1, n], [B, 1, n, n]) int32: how many blocks each row holds, and which, those first."""
    order_Bnn = table_Bnn.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    counts_Bn = table_Bnn.sum(2, dtype=torch.int32)
    return counts_Bn[:, None], order_Bnn.to(torch.int32)[:, None].contiguous()


def _pairs(
    window: int | None, doc_ids_BS: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a query sees a key, of scalars: row, head, query, key."""

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        pair = key <= query
        if window is not None:
            pair = pair & (key > query - window)
        if doc_ids_BS is not None:
            pair = pair & (doc_ids_BS[row, query] == doc_ids_BS[row, key])
        return pair

    return seen

"""Causal attention by torch's scaled_dot_product_attention; on a CPU, by blocks of queries.

torch's kernel for CPUs computes the scores of all keys where a mask is given, and those of whole blocks of
512 keys where none is, though causality throws half of them away. Here each block of queries gets the keys up
to its own end.

Shapes: B batch, S queries, K keys, Q query heads, G key and value heads, H head width, n queries of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_MOST_BLOCKS = 8  # more save little: eight leave 9/16 of the scores, and a half is the limit
_LARGE_BLOCKS_FROM = 768  # queries from which torch's own causal kernel takes blocks as good as ours


def attend(q_BQSH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, mask: Tensor | None) -> Tensor:
    """[B, S, Q, H]: each query's mean of the values, weighted by softmax(q k / sqrt(H) + mask).

    ``mask`` [B or 1, 1, S, K] is added to the scores, -inf for every key after the query; the queries are
    the last S of K positions. None: plainly causal (S = K), or one query that sees all keys.
    """
    seq, keys = q_BQSH.shape[2], k_BGKH.shape[2]
    rows = block_rows(seq, q_BQSH.dtype, mask is not None, q_BQSH.device) if seq == keys else None
    if rows is not None:
        return _by_blocks(q_BQSH, k_BGKH, v_BGKH, mask, rows)
    y_BQSH = F.scaled_dot_product_attention(
        q_BQSH, k_BGKH, v_BGKH, attn_mask=mask, is_causal=mask is None and seq > 1,
        enable_gqa=q_BQSH.shape[1] != k_BGKH.shape[1],
    )  # fmt: skip
    return y_BQSH.transpose(1, 2)


def block_rows(seq: int, dtype: torch.dtype, masked: bool, device: torch.device) -> int | None:
    """Queries of a block; None where the whole sequence at once is as fast (``benchmarks/attention.py``)."""
    # narrower products need more rows to be worth a call
    least_rows, least_seq = (256, 512) if dtype.itemsize < 4 else (128, 384)
    if device.type != "cpu" or seq < least_seq or not (masked or seq < _LARGE_BLOCKS_FROM):
        return None
    return max(least_rows, -(-seq // _MOST_BLOCKS))


def _by_blocks(q_BQSH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    repeats = q_BQSH.shape[1] // k_BGSH.shape[1]
    if repeats > 1:  # once here, as torch would in every call
        k_BGSH, v_BGSH = k_BGSH.repeat_interleave(repeats, 1), v_BGSH.repeat_interleave(repeats, 1)
    blocks = q_BQSH.split(rows, dim=2)
    ends = [min(rows * (i + 1), q_BQSH.shape[2]) for i in range(len(blocks))]
    band_nS = _band(rows, q_BQSH)
    outputs = []
    keys, values = _prefixes(k_BGSH, ends), _prefixes(v_BGSH, ends)
    for q_BQnH, k, v, end in zip(blocks, keys, values, ends, strict=True):
        n = q_BQnH.shape[2]
        bias = band_nS[-n:, -end:] if mask is None else mask[..., end - n : end, :end]
        y_BQnH = F.scaled_dot_product_attention(q_BQnH, k, v, attn_mask=bias)
        outputs.append(y_BQnH.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _band(rows: int, q_BQSH: Tensor) -> Tensor:
    """[n, S], whose last columns up to a block's end are that block's causal mask."""
    seq = q_BQSH.shape[2]
    triangle_nn = q_BQSH.new_full((rows, rows), float("-inf")).triu_(1)
    return torch.cat([q_BQSH.new_zeros(rows, seq - rows), triangle_nn], dim=1)


def _prefixes(x_BGSH: Tensor, ends: Sequence[int]) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = _Prefixes.apply(x_BGSH, ends)  # type: ignore[no-untyped-call]
    return parts


class _Prefixes(torch.autograd.Function):
    """The first ``end`` keys for every end; slicing's own gradient would be as many zero-padded tensors."""

    @staticmethod
    def forward(ctx: Any, x_BGSH: Tensor, ends: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.ends = ends
        return tuple(x_BGSH[:, :, :end] for end in ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total_BGSH = grads[-1].clone()  # the last end is S
        for end, grad in zip(ctx.ends[:-1], grads[:-1], strict=True):
            total_BGSH[:, :, :end] += grad
        return total_BGSH, None

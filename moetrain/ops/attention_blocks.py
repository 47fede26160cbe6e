"""Attention on a CPU by blocks of queries, each with the keys that some query of it may see.

torch's kernel computes the scores of all keys where a mask is given, and those of whole blocks of 512 keys
where none is, though causality, windows and documents throw most of them away. The bias of a block is made
when the block is computed, in the backward pass once more: nothing of S x K elements exists, and between the
passes only the inputs, the output and one number a query and head are kept.

The kernels are those that torch's scaled_dot_product_attention calls on a CPU.

Shapes: B batch, S queries, K keys, Q query heads, G key and value heads, H head width; n queries and m keys
of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.ops.seen_keys import SeenKeys

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_by_blocks(q_BQSH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, seen: SeenKeys, rows: int) -> Tensor:
    """[B, S, Q, H]: each query's mean of the values that it sees, weighted by softmax(q k / sqrt(H)).

    Not compiled: the bounds of the blocks are those of one batch, and each would be compiled for itself.
    """
    y_BSQH: Tensor = _Blocks.apply(q_BQSH, k_BGKH, v_BGKH, seen, rows)  # type: ignore[no-untyped-call]
    return y_BSQH


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BQSH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, seen: SeenKeys, rows: int
    ) -> Tensor:
        batch, heads, seq, width = q_BQSH.shape
        repeats = heads // k_BGKH.shape[1]
        k_BQKH, v_BQKH = _repeated(k_BGKH, repeats), _repeated(v_BGKH, repeats)
        y_BSQH = q_BQSH.new_empty(batch, seq, heads, width)
        sums = []
        for start, end, low in seen.blocks(rows):
            keys = slice(low, seen.cached + end)
            bias = seen.bias(start, end, low, q_BQSH.dtype, q_BQSH.device)
            y_BQnH, sum_BQn = _forward(
                q_BQSH[:, :, start:end], k_BQKH[:, :, keys], v_BQKH[:, :, keys], attn_mask=bias
            )
            y_BSQH[:, start:end] = y_BQnH.transpose(1, 2)
            sums.append(sum_BQn)
        ctx.save_for_backward(q_BQSH, k_BQKH, v_BQKH, y_BSQH, *sums)
        ctx.seen, ctx.rows, ctx.repeats = seen, rows, repeats
        return y_BSQH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSQH: Tensor) -> tuple[Tensor | None, ...]:
        q_BQSH, k_BQKH, v_BQKH, y_BSQH, *sums = ctx.saved_tensors
        seen = ctx.seen
        dq_BQSH = torch.empty_like(q_BQSH)
        dk_BQKH, dv_BQKH = torch.zeros_like(k_BQKH), torch.zeros_like(v_BQKH)
        for (start, end, low), sum_BQn in zip(seen.blocks(ctx.rows), sums, strict=True):
            keys = slice(low, seen.cached + end)
            dq_BQnH, dk_BQmH, dv_BQmH = _backward(
                dy_BSQH[:, start:end].transpose(1, 2),
                q_BQSH[:, :, start:end],
                k_BQKH[:, :, keys],
                v_BQKH[:, :, keys],
                y_BSQH[:, start:end].transpose(1, 2),
                sum_BQn,
                0.0,
                False,
                attn_mask=seen.bias(start, end, low, q_BQSH.dtype, q_BQSH.device),
            )
            dq_BQSH[:, :, start:end] = dq_BQnH
            dk_BQKH[:, :, keys] += dk_BQmH
            dv_BQKH[:, :, keys] += dv_BQmH
        return dq_BQSH, _summed(dk_BQKH, ctx.repeats), _summed(dv_BQKH, ctx.repeats), None, None


def _repeated(x_BGKH: Tensor, repeats: int) -> Tensor:
    return x_BGKH if repeats == 1 else x_BGKH.repeat_interleave(repeats, 1)


def _summed(x_BQKH: Tensor, repeats: int) -> Tensor:
    return x_BQKH if repeats == 1 else x_BQKH.unflatten(1, (-1, repeats)).sum(2)

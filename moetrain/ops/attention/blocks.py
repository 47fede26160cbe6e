"""Attention by blocks of queries, each with the keys that some query of it may see.

torch's CPU kernel computes the scores of all keys where a mask is given, and those of whole blocks of 512
keys where none is, though causality, windows and documents throw most of them away. The bias of a block is
made when the block is computed, in the backward pass once more: nothing of S x K elements exists, and between
the passes only the inputs, the output and one number a query and head are kept.

The kernels are those that torch's scaled_dot_product_attention calls on a CPU. The backward one is given
fp32, a block at a time: in bf16 it was slower wherever measured.

A sink, a logit s beside the scores whose value is zero, divides all weights by 1 + exp(s - l), with l the
logarithm of the sum of the scores' exponentials. So the kernel computes without it, the output is scaled, and
l' = log(exp(l) + exp(s)) takes l's place in the backward kernel, which recovers the weights by it.

Shapes: B batch, S queries, K keys, Q query heads, G key and value heads, H head width; n queries and m keys
of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.ops.attention.case import Case, Plan
from moetrain.ops.attention.seen_keys import SeenKeys

_MOST_ROWS = 512  # of a block; more save no time, and the bias of a block grows with them
_LEAST_SEQ = 384  # queries from which fewer keys are worth more calls
_LARGE_BLOCKS_FROM = 768  # queries from which torch's own causal kernel takes blocks as good as ours


class Kernel(NamedTuple):
    """Attention of one block, with as many heads of keys as of queries.

    forward(q, k, v, bias) -> (y [B, Q, n, H], what its backward pass needs besides inputs and y).
    backward(dy, q, k, v, y, kept, bias) -> the gradients of q, k and v.
    What one keeps that can have sinks is l [B, Q, n], in fp32 at least.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def refusal(case: Case) -> str | None:
    return None if case.device.type == "cpu" else f"its kernels are those of a CPU, not of {case.device.type}"


def worthwhile(case: Case) -> bool:
    """Whether it is faster than the whole sequence at once (``benchmarks/attention.py``).

    In bf16 without a cache, as in training, always: torch's own backward pass takes up to three times as long
    where the processor multiplies bf16, and up to 26 times elsewhere.
    """
    if case.dtype.itemsize < 4 and not case.cached and case.seq > 1:
        return True
    return case.seq >= _LEAST_SEQ and (case.seen is not None or case.seq < _LARGE_BLOCKS_FROM)


def prepare(case: Case) -> Plan:
    return Plan("blocks", case.seen or SeenKeys(case.seq))


def attend(
    q_BQSH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, plan: Plan, sinks_Q: Tensor | None = None
) -> Tensor:
    seq = q_BQSH.shape[2]
    seen = plan.seen or SeenKeys(seq)
    rows = block_rows(seq, q_BQSH.dtype)
    y_BSQH: Tensor = attend_by_blocks(q_BQSH, k_BGKH, v_BGKH, seen, rows, CPU, sinks_Q)
    return y_BSQH


def block_rows(seq: int, dtype: torch.dtype) -> int:
    """Queries of a block."""
    return max(256 if dtype.itemsize < 4 else 128, min(_MOST_ROWS, -(-seq // 8)))


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=bias
    )
    return result


def _cpu_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    wide = torch.promote_types(q.dtype, torch.float32)
    operands = (x.to(wide) for x in (dy, q, k, v, y))
    gradients: tuple[Tensor, ...] = kernel(*operands, sums, 0.0, False, attn_mask=bias.to(wide))
    return gradients


CPU = Kernel(_cpu_forward, _cpu_backward)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_by_blocks(
    q_BQSH: Tensor,
    k_BGKH: Tensor,
    v_BGKH: Tensor,
    seen: SeenKeys,
    rows: int,
    kernel: Kernel,
    sinks_Q: Tensor | None = None,
) -> Tensor:
    """[B, S, Q, H]: each query's mean of the values that it sees, weighted by softmax(q k / sqrt(H)).

    ``sinks_Q``: a logit of each head that takes part in the softmax and has no value.

    Not compiled: the bounds of the blocks are those of one batch, and each would be compiled for itself.
    """
    y_BSQH: Tensor = _Blocks.apply(  # type: ignore[no-untyped-call]
        q_BQSH, k_BGKH, v_BGKH, sinks_Q, seen, rows, kernel
    )
    return y_BSQH


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BQSH: Tensor,
        k_BGKH: Tensor,
        v_BGKH: Tensor,
        sinks_Q: Tensor | None,
        seen: SeenKeys,
        rows: int,
        kernel: Kernel,
    ) -> Tensor:
        batch, heads, seq, width = q_BQSH.shape
        repeats = heads // k_BGKH.shape[1]
        y_BSQH = q_BQSH.new_empty(batch, seq, heads, width)
        blocks = seen.blocks(rows)
        bias = seen.biases(blocks, q_BQSH.dtype, q_BQSH.device)
        kept = []
        for start, end, low in blocks:
            keys = slice(low, seen.cached + end)
            k_BQmH, v_BQmH = (_repeated(x[:, :, keys], repeats) for x in (k_BGKH, v_BGKH))
            y_BQnH, kept_of_block = kernel.forward(
                q_BQSH[:, :, start:end], k_BQmH, v_BQmH, bias(start, end, low)
            )
            if sinks_Q is not None:
                y_BQnH, kept_of_block = _with_sinks(y_BQnH, kept_of_block, sinks_Q)
            y_BSQH[:, start:end] = y_BQnH.transpose(1, 2)
            kept.append(kept_of_block)
        ctx.save_for_backward(q_BQSH, k_BGKH, v_BGKH, sinks_Q, y_BSQH, *kept)
        ctx.seen, ctx.blocks, ctx.repeats, ctx.kernel = seen, blocks, repeats, kernel
        return y_BSQH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSQH: Tensor) -> tuple[Tensor | None, ...]:
        q_BQSH, k_BGKH, v_BGKH, sinks_Q, y_BSQH, *kept = ctx.saved_tensors
        bias = ctx.seen.biases(ctx.blocks, q_BQSH.dtype, q_BQSH.device)
        dq_BQSH = torch.empty_like(q_BQSH)
        wide = torch.promote_types(q_BQSH.dtype, torch.float32)  # several blocks add to a key's gradient
        dk_BGKH, dv_BGKH = torch.zeros_like(k_BGKH, dtype=wide), torch.zeros_like(v_BGKH, dtype=wide)
        dsinks_Q = None if sinks_Q is None else torch.zeros_like(sinks_Q, dtype=wide)
        for (start, end, low), kept_of_block in zip(ctx.blocks, kept, strict=True):
            queries, keys = slice(start, end), slice(low, ctx.seen.cached + end)
            k_BQmH, v_BQmH = (_repeated(x[:, :, keys], ctx.repeats) for x in (k_BGKH, v_BGKH))
            dq_BQnH, dk_BQmH, dv_BQmH = ctx.kernel.backward(
                dy_BSQH[:, queries].transpose(1, 2), q_BQSH[:, :, queries], k_BQmH, v_BQmH,
                y_BSQH[:, queries].transpose(1, 2), kept_of_block, bias(start, end, low),
            )  # fmt: skip
            dq_BQSH[:, :, queries] = dq_BQnH
            dk_BGKH[:, :, keys] += _summed(dk_BQmH, ctx.repeats, wide)
            dv_BGKH[:, :, keys] += _summed(dv_BQmH, ctx.repeats, wide)
            if dsinks_Q is not None:
                dsinks_Q += _gradient_of_sinks(
                    dy_BSQH[:, queries], y_BSQH[:, queries], kept_of_block, sinks_Q
                )
        dsinks_Q = None if dsinks_Q is None else dsinks_Q.to(sinks_Q.dtype)
        return dq_BQSH, dk_BGKH.to(k_BGKH.dtype), dv_BGKH.to(v_BGKH.dtype), dsinks_Q, None, None, None


def _with_sinks(y_BQnH: Tensor, sums_BQn: Tensor, sinks_Q: Tensor) -> tuple[Tensor, Tensor]:
    """(the output with sinks, the logarithms of the sums with theirs)."""
    joined_BQn = torch.logaddexp(sums_BQn, sinks_Q[:, None].to(sums_BQn.dtype))
    return y_BQnH * (sums_BQn - joined_BQn).exp()[..., None].to(y_BQnH.dtype), joined_BQn


def _gradient_of_sinks(dy_BnQH: Tensor, y_BnQH: Tensor, joined_BQn: Tensor, sinks_Q: Tensor) -> Tensor:
    """[Q]: as that of any score, weight times (dy value - dy y), with a value of zero."""
    wide = joined_BQn.dtype
    inner_BQn = torch.linalg.vecdot(dy_BnQH.to(wide), y_BnQH.to(wide)).transpose(1, 2)
    weights_BQn: Tensor = (sinks_Q[:, None].to(wide) - joined_BQn).exp()
    dsinks_Q: Tensor = (weights_BQn * inner_BQn).sum((0, 2)).neg()
    return dsinks_Q


def _repeated(x_BGmH: Tensor, repeats: int) -> Tensor:
    """By a plain copy: repeat_interleave would look every row up by its index."""
    return x_BGmH if repeats == 1 else x_BGmH[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def _summed(x_BQmH: Tensor, repeats: int, dtype: torch.dtype) -> Tensor:
    return x_BQmH if repeats == 1 else x_BQmH.unflatten(1, (-1, repeats)).sum(2, dtype=dtype)

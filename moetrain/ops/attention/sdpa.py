"""torch's scaled_dot_product_attention: one call where plainly causal, else one a block of queries.

A block's bias is made when the block is computed. The backward pass computes each block again, so that only
the inputs and the output are kept.

Shapes: B batch, S queries, K keys, Q query heads, G key and value heads, H head width; n queries and m keys
of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops.attention import blocks
from moetrain.ops.attention.blocks import Kernel, attend_by_blocks
from moetrain.ops.attention.case import Case, Plan

_ROWS = 512  # queries of a block
_SHORT = 128  # queries up to which an accelerator gains nothing by leaving out blocks


def refusal(case: Case) -> str | None:
    return None


def worthwhile(case: Case) -> bool:
    """Where nothing is left out, or too little for another backend."""
    if case.device.type == "cpu":
        return not blocks.worthwhile(case)
    return case.seen is None or case.cached > 0 or case.seq <= _SHORT


def prepare(case: Case) -> Plan:
    return Plan("sdpa", case.seen)


def attend(q_BQSH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, plan: Plan) -> Tensor:
    seq, seen = q_BQSH.shape[2], plan.seen
    if seen is not None and seq > _ROWS:
        y_BSQH: Tensor = attend_by_blocks(q_BQSH, k_BGKH, v_BGKH, seen, _ROWS, RECOMPUTED)
        return y_BSQH
    mask = None if seen is None else seen.bias(0, seq, 0, q_BQSH.dtype, q_BQSH.device)
    y_BQSH = F.scaled_dot_product_attention(
        q_BQSH, k_BGKH, v_BGKH, attn_mask=mask, is_causal=seen is None and seq > 1,
        enable_gqa=q_BQSH.shape[1] != k_BGKH.shape[1],
    )  # fmt: skip
    return y_BQSH.transpose(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias), q.new_empty(0)


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, kept: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        again = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return torch.autograd.grad(again, (q, k, v), dy)


RECOMPUTED = Kernel(_forward, _backward)

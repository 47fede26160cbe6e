"""torch's scaled_dot_product_attention: one call where plainly causal, else one a block of queries.

A block's bias is made when the block is computed. The backward pass computes each block again, so that only
the inputs and the output are kept. With sinks (``blocks.py``), which that function does not know, a block is
computed as the formula says, in fp32 at least.

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
from moetrain.ops.attention.seen_keys import SeenKeys

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


def attend(
    q_BQSH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, plan: Plan, sinks_Q: Tensor | None = None
) -> Tensor:
    seq, seen = q_BQSH.shape[2], plan.seen
    if sinks_Q is not None:
        seen = seen or SeenKeys(seq, k_BGKH.shape[2] - seq)
        with_sinks: Tensor = attend_by_blocks(q_BQSH, k_BGKH, v_BGKH, seen, _ROWS, FORMULA, sinks_Q)
        return with_sinks
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


def _formula_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, bias)
    sums = scores.logsumexp(-1)
    y = scores.sub_(sums[..., None]).exp_() @ v.to(scores.dtype)
    return y.to(q.dtype), sums


def _formula_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    weights = _scores(q, k, bias).sub_(sums[..., None]).exp_()
    wide = weights.dtype
    dy, q, k, v, y = (x.to(wide) for x in (dy, q, k, v, y))
    dv = weights.transpose(2, 3) @ dy
    dscores = weights.mul_(dy @ v.transpose(2, 3) - torch.linalg.vecdot(dy, y)[..., None])
    dscores.mul_(q.shape[3] ** -0.5)
    return dscores @ k, dscores.transpose(2, 3) @ q, dv


def _scores(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return (q.to(wide) @ k.to(wide).transpose(2, 3)).mul_(q.shape[3] ** -0.5).add_(bias)


FORMULA = Kernel(_formula_forward, _formula_backward)

"""Causal attention: torch's scaled_dot_product_attention over the whole sequence or, on a CPU, by blocks.

Shapes: B batch, S queries, K keys, Q query heads, G key and value heads, H head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops.attention_blocks import attend_by_blocks
from moetrain.ops.precision import product_dtype
from moetrain.ops.seen_keys import SeenKeys

_MOST_ROWS = 512  # of a block; more save no time, and the bias of a block grows with them
_LARGE_BLOCKS_FROM = 768  # queries from which torch's own causal kernel takes blocks as good as ours


def attend(q_BQSH: Tensor, k_BGKH: Tensor, v_BGKH: Tensor, seen: SeenKeys | None) -> Tensor:
    """[B, S, Q, H]: each query's mean of the values it sees, weighted by softmax(q k / sqrt(H)).

    ``seen`` None: plainly causal (S = K), or one query that sees all keys.
    """
    seq, device, dtype = q_BQSH.shape[2], q_BQSH.device, product_dtype(q_BQSH)
    rows = block_rows(seq, dtype, seen is not None, device)
    if rows is not None:
        narrow = [x.to(dtype) for x in (q_BQSH, k_BGKH, v_BGKH)]  # as autocast does for torch's own function
        y_BSQH: Tensor = attend_by_blocks(*narrow, seen or SeenKeys(seq), rows)
        return y_BSQH
    mask = None if seen is None else seen.bias(0, seq, 0, dtype, device)
    y_BQSH = F.scaled_dot_product_attention(
        q_BQSH, k_BGKH, v_BGKH, attn_mask=mask, is_causal=seen is None and seq > 1,
        enable_gqa=q_BQSH.shape[1] != k_BGKH.shape[1],
    )  # fmt: skip
    return y_BQSH.transpose(1, 2)


def block_rows(seq: int, dtype: torch.dtype, masked: bool, device: torch.device) -> int | None:
    """Queries of a block; None where the whole sequence at once is as fast (``benchmarks/attention.py``)."""
    # narrower products need more rows to be worth a call
    least_rows, least_seq = (256, 512) if dtype.itemsize < 4 else (128, 384)
    if device.type != "cpu" or seq < least_seq or not (masked or seq < _LARGE_BLOCKS_FROM):
        return None
    return max(least_rows, min(_MOST_ROWS, -(-seq // 8)))

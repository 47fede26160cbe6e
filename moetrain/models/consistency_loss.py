"""How far the predictions of two passes are apart, by chunks of rows: no logits of the whole batch are kept.

Shapes: B batch, S sequence, D model, V vocabulary, n = B S rows, c rows of one chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.models.loss import IGNORED
from moetrain.ops.precision import product_dtype

_CHUNK_ELEMENTS = 2**21  # logits of one pass in a chunk
_MIN_ROWS = 256


def symmetric_kl_sum(
    one_BSD: Tensor, other_BSD: Tensor, head_weight_VD: Tensor, labels_BS: Tensor, chunk: int | None = None
) -> Tensor:
    """The sum of (KL(p, q) + KL(q, p)) / 2 in nats over the positions that have a label, fp32 at least.

    p and q are softmax(hidden times head) of two hidden states. The backward pass computes a chunk's logits
    again. ``chunk``: rows at a time; None chooses.
    """
    narrow_VD = head_weight_VD.to(product_dtype(one_BSD))
    asked_n = (labels_BS != IGNORED).reshape(-1)
    rows = chunk or max(_MIN_ROWS, _CHUNK_ELEMENTS // head_weight_VD.shape[0])
    passes = zip(one_BSD.flatten(0, 1).split(rows), other_BSD.flatten(0, 1).split(rows), strict=True)
    total = torch.zeros((), dtype=torch.promote_types(narrow_VD.dtype, torch.float32), device=asked_n.device)
    for (one_cD, other_cD), asked_c in zip(passes, asked_n.split(rows), strict=True):
        arguments = (one_cD, other_cD, narrow_VD, asked_c)
        total = total + checkpoint(_of_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
    return total


def _of_chunk(one_cD: Tensor, other_cD: Tensor, narrow_VD: Tensor, asked_c: Tensor) -> Tensor:
    with torch.autocast(one_cD.device.type, enabled=False):
        p_cV, q_cV = (_log_probabilities(hidden_cD, narrow_VD) for hidden_cD in (one_cD, other_cD))
        apart_c = ((p_cV.exp() - q_cV.exp()) * (p_cV - q_cV)).sum(-1) / 2
        return torch.where(asked_c, apart_c, 0.0).sum()


def _log_probabilities(hidden_cD: Tensor, narrow_VD: Tensor) -> Tensor:
    logits_cV = F.linear(hidden_cD.to(narrow_VD.dtype), narrow_VD)
    return logits_cV.to(torch.promote_types(logits_cV.dtype, torch.float32)).log_softmax(-1)

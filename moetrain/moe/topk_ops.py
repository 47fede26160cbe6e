"""Choosing the best, with one rule for ties: the lower index wins, on every device.

Shapes: leading dimensions are free; E columns, k chosen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top_ids(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest along the last dimension, int64 [..., k], best first, ties by lower index.

    torch.topk leaves ties open. Here fp32 scores and their indices become one integer key, so that it has
    none to break; wider scores are sorted. NaN counts as the largest.
    """
    if scores.dtype is not torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # A negative zero is a zero, and NaN has no sign: an x86 makes negative ones, which would come last.
    plain = (scores.detach() + 0.0).nan_to_num_(math.nan, math.inf, -math.inf)
    bits = plain.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    columns = torch.arange(scores.shape[-1], device=scores.device)
    return ((ordered << 32) | (0xFFFFFFFF - columns)).topk(k, dim=-1).indices


def first_max(scores: Tensor) -> Tensor:
    """Index of the largest along the last dimension, int64 [...], ties by lower index."""
    return top_ids(scores, 1).squeeze(-1)


def softmax(logits: Tensor) -> Tensor:
    """Over the last dimension; -inf counts as an expert that is out, and a row of them alone is uniform."""
    return logits.clamp(min=torch.finfo(logits.dtype).min).softmax(-1)

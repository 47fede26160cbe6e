"""Embedding whose weight's gradient is summed in fp32 at least, whatever the weight's dtype.

A frequent token's row is a sum over many positions; torch's own backward on a CPU adds them in bf16.

Shapes: leading dimensions of ids are free; V vocabulary, D model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def embedding(ids: Tensor, weight_VD: Tensor) -> Tensor:
    """``weight[ids]``, as F.embedding."""
    if weight_VD.dtype.itemsize >= 4:
        return F.embedding(ids, weight_VD)
    x: Tensor = _Embedding.apply(ids, weight_VD)  # type: ignore[no-untyped-call]
    return x


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocab_size, ctx.dtype = weight_VD.shape[0], weight_VD.dtype
        return F.embedding(ids, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        wide = torch.ops.aten.embedding_dense_backward(dx.float(), ids, ctx.vocab_size, -1, False)
        return None, wide.to(ctx.dtype)

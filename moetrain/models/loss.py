"""Output projection and cross-entropy together, by chunks of rows: no logits of the whole batch are kept.

Shapes: B batch, S sequence, D model, V vocabulary, n = B S rows, c rows of one chunk.
The gradients are formed in the forward pass, while a chunk's logits are at hand (as Liger Kernel, 2024,
does): three matrix products in all, as without chunks, and nothing is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.models.precision import product_dtype

IGNORED = -100  # a label that asks for nothing
_CHUNK_ELEMENTS = 2**21  # logits of one chunk: 8 MiB in fp32, which stays near the cache
_MIN_ROWS = 128  # fewer rows waste the matrix product


def cross_entropy_sum(
    hidden_BSD: Tensor, head_weight_VD: Tensor, labels_BS: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """(sum of -log p(label) in nats, number of labels), labels of -100 left out of both.

    The sum is fp64 for fp64 input, else fp32; the count is an int64 scalar. Under autocast the three products
    run in its dtype and the rest in fp32. ``chunk``: rows at a time; None chooses.
    """
    hidden_nD, labels_n = _flatten(hidden_BSD, labels_BS)
    count = (labels_n != IGNORED).sum()
    rows = _rows(chunk, head_weight_VD)
    if torch.is_grad_enabled() and (hidden_nD.requires_grad or head_weight_VD.requires_grad):
        total: Tensor = _CrossEntropySum.apply(hidden_nD, head_weight_VD, labels_n, rows)
        return total, count
    return _nll(hidden_nD, head_weight_VD, labels_n, rows).sum(), count


@torch.no_grad()
def token_nll(
    hidden_BSD: Tensor, head_weight_VD: Tensor, labels_BS: Tensor, chunk: int | None = None
) -> Tensor:
    """-log p(label) in nats per token, [B, S], 0 where the label is -100. For evaluation: no gradient."""
    hidden_nD, labels_n = _flatten(hidden_BSD, labels_BS)
    return _nll(hidden_nD, head_weight_VD, labels_n, _rows(chunk, head_weight_VD)).view(labels_BS.shape)


def _flatten(hidden_BSD: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    if hidden_BSD.shape[:-1] != labels_BS.shape:
        raise ValueError(f"hidden is {tuple(hidden_BSD.shape)}, but labels are {tuple(labels_BS.shape)}")
    return hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), labels_BS.reshape(-1)


def _rows(chunk: int | None, head_weight_VD: Tensor) -> int:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 row")
    return chunk or max(_MIN_ROWS, _CHUNK_ELEMENTS // head_weight_VD.shape[0])


class _Buffers:
    """Room for one chunk's logits and probabilities, used again by every chunk: fresh pages cost more than GEMMs."""

    def __init__(self, rows: int, weight_VD: Tensor) -> None:
        vocab, self.dtype = weight_VD.shape[0], weight_VD.dtype
        wide = torch.promote_types(self.dtype, torch.float32)
        self.product_cV = weight_VD.new_empty(rows, vocab)
        self.wide_cV = self.product_cV if wide is self.dtype else weight_VD.new_empty(rows, vocab, dtype=wide)
        self.p_cV = torch.empty_like(self.wide_cV)

    def logits(self, hidden_cD: Tensor, weight_VD: Tensor) -> Tensor:
        """hidden @ weight.T in the products' dtype, widened to at least fp32."""
        rows = hidden_cD.shape[0]
        torch.mm(hidden_cD, weight_VD.t(), out=self.product_cV[:rows])
        return self.wide_cV[:rows].copy_(self.product_cV[:rows])

    def probabilities(self, logits_cV: Tensor) -> Tensor:
        return torch.softmax(logits_cV, dim=-1, out=self.p_cV[: logits_cV.shape[0]])


def _chunks(hidden_nD: Tensor, weight_VD: Tensor, labels_n: Tensor, rows: int, buffers: _Buffers)-> Iterator[tuple[Any, ...]]:
    for start in range(0, hidden_nD.shape[0], rows):
        at = slice(start, start + rows)
        hidden_cD = hidden_nD[at].to(weight_VD.dtype)
        valid_c = labels_n[at] != IGNORED
        yield at, hidden_cD, buffers.logits(hidden_cD, weight_VD), labels_n[at].where(valid_c, 0)[:, None], valid_c[:, None]


def _nll(hidden_nD: Tensor, weight_VD: Tensor, labels_n: Tensor, rows: int) -> Tensor:
    dtype = product_dtype(hidden_nD)
    nll_n1 = hidden_nD.new_empty(hidden_nD.shape[0], 1, dtype=torch.promote_types(dtype, torch.float32))
    buffers = _Buffers(rows, weight_VD.to(dtype))
    with torch.autocast(hidden_nD.device.type, enabled=False):
        for at, _, logits_cV, label_c1, valid_c1 in _chunks(hidden_nD, weight_VD.to(dtype), labels_n, rows, buffers):
            nll_c1 = logits_cV.logsumexp(-1, keepdim=True) - logits_cV.gather(-1, label_c1)
            nll_n1[at] = nll_c1.where(valid_c1, 0)
    return nll_n1.squeeze(-1)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_nD: Tensor, weight_VD: Tensor, labels_n: Tensor, rows: int) -> Tensor:
        dtype = product_dtype(hidden_nD)
        wide = torch.promote_types(dtype, torch.float32)
        nll = hidden_nD.new_zeros((), dtype=wide)
        dhidden_nD = torch.empty_like(hidden_nD)
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide)
        with torch.autocast(hidden_nD.device.type, enabled=False):
            cast_VD = weight_VD.to(dtype)
            buffers = _Buffers(rows, cast_VD)
            for at, hidden_cD, logits_cV, label_c1, valid_c1 in _chunks(hidden_nD, cast_VD, labels_n, rows, buffers):
                p_cV = buffers.probabilities(logits_cV)
                top_c1, where_c1 = logits_cV.max(-1, keepdim=True)
                lse_c1 = top_c1 - p_cV.gather(-1, where_c1).log()
                nll_c1 = lse_c1 - logits_cV.gather(-1, label_c1)
                nll += nll_c1.where(valid_c1, 0).sum()
                p_cV.scatter_(-1, label_c1, torch.expm1(-nll_c1))
                dlogits_cV = p_cV if dtype is wide else buffers.product_cV[:len(p_cV)].copy_(p_cV)
                dhidden_nD[at] = (dlogits_cV @ cast_VD).mul_(valid_c1)
                hidden_cD = hidden_cD * valid_c1
                if dtype is wide:
                    dweight_VD.addmm_(dlogits_cV.t(), hidden_cD)
                else:
                    dweight_VD.add_(dlogits_cV.t() @ hidden_cD)
        ctx.save_for_backward(dhidden_nD, dweight_VD.to(weight_VD.dtype))
        return nll

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dhidden_nD, dweight_VD = ctx.saved_tensors
        return dhidden_nD * grad, dweight_VD * grad, None, None

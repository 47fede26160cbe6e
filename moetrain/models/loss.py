"""Output projection and cross-entropy together, by chunks of rows: no logits of the whole batch are kept.

Shapes: B batch, S sequence, D model, V vocabulary, n = B S rows, c rows of one chunk.
The gradients are formed in the forward pass, while a chunk's logits are at hand (as Liger Kernel, 2024,
does): three matrix products in all, as without chunks, and nothing is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.ops.cpu.product import add_outer, product
from moetrain.ops.precision import product_dtype

IGNORED = -100  # a label that asks for nothing
_CHUNK_ELEMENTS = 2**21  # logits of one chunk: 8 MiB in fp32, which stays near the cache
_MIN_ROWS = 256  # fewer rows waste the matrix products


def cross_entropy_sum(
    hidden_BSD: Tensor, head_weight_VD: Tensor, labels_BS: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """(sum of -log p(label) in nats, number of labels), labels of -100 left out of both.

    The sum is fp64 for fp64 input, else fp32; the count is an int64 scalar tensor. Under autocast the three
    products run in its dtype and the rest in fp32. ``chunk``: rows at a time; None chooses.
    Raises ValueError where the shapes of hidden and labels differ.
    """
    hidden_nD, labels_n = _flatten(hidden_BSD, labels_BS)
    count = (labels_n != IGNORED).sum()
    rows = _rows(chunk, head_weight_VD, hidden_nD)
    if torch.is_grad_enabled() and (hidden_nD.requires_grad or head_weight_VD.requires_grad):
        total: Tensor = _CrossEntropySum.apply(hidden_nD, head_weight_VD, labels_n, rows)  # type: ignore[no-untyped-call]
        return total, count
    return _nll(hidden_nD, head_weight_VD, labels_n, rows).sum(), count


@torch.no_grad()
def token_nll(
    hidden_BSD: Tensor, head_weight_VD: Tensor, labels_BS: Tensor, chunk: int | None = None
) -> Tensor:
    """-log p(label) in nats per token, [B, S], 0 where the label is -100. For evaluation: no gradient."""
    hidden_nD, labels_n = _flatten(hidden_BSD, labels_BS)
    rows = _rows(chunk, head_weight_VD, hidden_nD)
    return _nll(hidden_nD, head_weight_VD, labels_n, rows).view(labels_BS.shape)


def _flatten(hidden_BSD: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    if hidden_BSD.shape[:-1] != labels_BS.shape:
        raise ValueError(f"hidden is {tuple(hidden_BSD.shape)}, but labels are {tuple(labels_BS.shape)}")
    return hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), labels_BS.reshape(-1)


def _rows(chunk: int | None, head_weight_VD: Tensor, hidden_nD: Tensor) -> int:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 row")
    rows = chunk or max(_MIN_ROWS, _CHUNK_ELEMENTS // head_weight_VD.shape[0])
    return min(rows, max(1, hidden_nD.shape[0]))


class _Chunk(NamedTuple):
    """Ignored labels read 0."""

    at: slice
    hidden_cD: Tensor
    logits_cV: Tensor
    label_c1: Tensor
    valid_c1: Tensor


def _chunks(hidden_nD: Tensor, weight_VD: Tensor, labels_n: Tensor, rows: int) -> Iterator[_Chunk]:
    wide = torch.promote_types(weight_VD.dtype, torch.float32)
    for start in range(0, hidden_nD.shape[0], rows):
        at = slice(start, start + rows)
        hidden_cD = hidden_nD[at].to(weight_VD.dtype)
        valid_c = labels_n[at] != IGNORED
        label_c1 = labels_n[at].where(valid_c, 0)[:, None]
        logits_cV = product(hidden_cD, weight_VD.t()).to(wide)
        yield _Chunk(at, hidden_cD, logits_cV, label_c1, valid_c[:, None])


def _nll(hidden_nD: Tensor, weight_VD: Tensor, labels_n: Tensor, rows: int) -> Tensor:
    with torch.no_grad():
        weight_VD = weight_VD.to(product_dtype(hidden_nD))
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        nll_n1 = torch.empty(hidden_nD.shape[0], 1, dtype=wide, device=hidden_nD.device)
        with torch.autocast(hidden_nD.device.type, enabled=False):
            for c in _chunks(hidden_nD, weight_VD, labels_n, rows):
                nll_c1 = c.logits_cV.logsumexp(-1, keepdim=True) - c.logits_cV.gather(-1, c.label_c1)
                nll_n1[c.at] = nll_c1.where(c.valid_c1, 0)
    return nll_n1.squeeze(-1)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_nD: Tensor, weight_VD: Tensor, labels_n: Tensor, rows: int) -> Tensor:
        narrow_VD = weight_VD.to(product_dtype(hidden_nD))
        wide = torch.promote_types(narrow_VD.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_nD.device)
        dhidden_nD = torch.empty_like(hidden_nD)
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide)
        p_room_cV = weight_VD.new_empty(rows, weight_VD.shape[0], dtype=wide)  # fresh pages are dear
        with torch.autocast(hidden_nD.device.type, enabled=False):
            for c in _chunks(hidden_nD, narrow_VD, labels_n, rows):
                p_cV = torch.softmax(c.logits_cV, dim=-1, out=p_room_cV[: c.logits_cV.shape[0]])
                # The largest probability is at least 1 / V, so its logarithm is safe: this is logsumexp.
                lse_c1 = c.logits_cV.amax(-1, keepdim=True) - p_cV.amax(-1, keepdim=True).log()
                nll_c1 = lse_c1 - c.logits_cV.gather(-1, c.label_c1)
                total += nll_c1.where(c.valid_c1, 0).sum()
                # p - 1 at the label, without cancellation, before any rounding to bf16.
                dlogits_cV = p_cV.scatter_(-1, c.label_c1, torch.expm1(-nll_c1)).to(narrow_VD.dtype)
                dhidden_nD[c.at] = product(dlogits_cV, narrow_VD).mul_(c.valid_c1)
                add_outer(dweight_VD, dlogits_cV, c.hidden_cD * c.valid_c1)
        ctx.save_for_backward(dhidden_nD, dweight_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dhidden_nD, dweight_VD = ctx.saved_tensors
        return dhidden_nD * grad, dweight_VD * grad, None, None

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


def _chunks(hidden_nD: Tensor, weight_VD: Tensor, labels_n: Tensor, rows: int) -> Iterator[tuple[Any, ...]]:
    """Per chunk: its slice, hidden rows, log-probabilities (a fresh tensor), labels made safe, and which count."""
    wide = torch.promote_types(weight_VD.dtype, torch.float32)
    for start in range(0, hidden_nD.shape[0], rows):
        at = slice(start, start + rows)
        hidden_cD = hidden_nD[at].to(weight_VD.dtype)
        logp_cV = torch.log_softmax(hidden_cD @ weight_VD.t(), dim=-1, dtype=wide)
        valid_c = labels_n[at] != IGNORED
        yield at, hidden_cD, logp_cV, labels_n[at].where(valid_c, 0), valid_c


def _nll(hidden_nD: Tensor, weight_VD: Tensor, labels_n: Tensor, rows: int) -> Tensor:
    dtype = product_dtype(hidden_nD)
    nll_n = hidden_nD.new_zeros(hidden_nD.shape[0], dtype=torch.promote_types(dtype, torch.float32))
    with torch.autocast(hidden_nD.device.type, enabled=False):
        for at, _, logp_cV, label_c, valid_c in _chunks(hidden_nD, weight_VD.to(dtype), labels_n, rows):
            nll_n[at] = -logp_cV.gather(-1, label_c[:, None]).squeeze(-1) * valid_c
    return nll_n


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_nD: Tensor, weight_VD: Tensor, labels_n: Tensor, rows: int) -> Tensor:
        dtype = product_dtype(hidden_nD)
        wide = torch.promote_types(dtype, torch.float32)
        nll_n = hidden_nD.new_zeros(hidden_nD.shape[0], dtype=wide)
        dhidden_nD = torch.empty_like(hidden_nD)
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide)
        with torch.autocast(hidden_nD.device.type, enabled=False):
            cast_VD = weight_VD.to(dtype)
            for at, hidden_cD, p_cV, label_c, valid_c in _chunks(hidden_nD, cast_VD, labels_n, rows):
                nll_n[at] = -p_cV.gather(-1, label_c[:, None]).squeeze(-1) * valid_c
                p_cV.exp_().scatter_add_(-1, label_c[:, None], p_cV.new_full((len(label_c), 1), -1.0))
                dlogits_cV = p_cV.mul_(valid_c[:, None]).to(dtype)
                dhidden_nD[at] = dlogits_cV @ cast_VD
                if dtype is wide:
                    dweight_VD.addmm_(dlogits_cV.t(), hidden_cD)
                else:
                    dweight_VD.add_(dlogits_cV.t() @ hidden_cD)
        ctx.save_for_backward(dhidden_nD, dweight_VD.to(weight_VD.dtype))
        return nll_n.sum()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dhidden_nD, dweight_VD = ctx.saved_tensors
        return dhidden_nD * grad, dweight_VD * grad, None, None

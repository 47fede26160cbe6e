"""The gradient of the logits, from those of the weights and of the scores; scores are computed again.

Tiles: T tokens, E columns (experts), K chosen; each padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import LEAST, sigmoid, softmax


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    dlogits, dweights, dscores, logits, ids, tokens, experts, route_scale,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr, AFTER: tl.constexpr, RENORMALIZE: tl.constexpr,
    HAS_DWEIGHTS: tl.constexpr, HAS_DSCORES: tl.constexpr,
):  # fmt: skip
    """``BLOCK_T`` tokens a program; all tensors are contiguous. A choice without a gradient is none."""
    row_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column_E, place_K = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    real_1E = (column_E < experts)[None, :]
    inside_TE = (row_T < tokens)[:, None] & real_1E
    at_TE = row_T[:, None] * experts + column_E[None, :]
    logits_TE = tl.load(logits + at_TE, mask=inside_TE, other=0.0)
    scores_TE = sigmoid(logits_TE, real_1E) if SIGMOID else softmax(logits_TE, real_1E)
    dscores_TE = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if HAS_DSCORES:
        dscores_TE = tl.load(dscores + at_TE, mask=inside_TE, other=0.0)
    dchosen_TE = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if HAS_DWEIGHTS and (AFTER or TOP_K > 1 or not RENORMALIZE):
        chosen_TK = (row_T < tokens)[:, None] & (place_K < TOP_K)[None, :]
        at_TK = row_T[:, None] * TOP_K + place_K[None, :]
        ids_TK = tl.load(ids + at_TK, mask=chosen_TK, other=-1).to(tl.int32)
        dweights_TK = tl.load(dweights + at_TK, mask=chosen_TK, other=0.0) * route_scale
        weighed_TE = logits_TE if AFTER else scores_TE
        weighed_TK = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        for place in range(TOP_K):
            here_TE = column_E[None, :] == _at(ids_TK, place_K, place)[:, None]
            weight_T = tl.sum(tl.where(here_TE, weighed_TE, 0.0), axis=1)
            weighed_TK = tl.where(place_K[None, :] == place, weight_T[:, None], weighed_TK)
        if AFTER:
            dchosen_TK = _softmax_backward(dweights_TK, softmax(weighed_TK, (place_K < TOP_K)[None, :]))
        elif RENORMALIZE:
            total_T = tl.sum(weighed_TK, axis=1) + 1e-20
            mean_T = tl.sum(dweights_TK * (weighed_TK / total_T[:, None]), axis=1)
            dchosen_TK = (dweights_TK - mean_T[:, None]) / total_T[:, None]
        else:
            dchosen_TK = dweights_TK
        for place in range(TOP_K):
            here_TE = column_E[None, :] == _at(ids_TK, place_K, place)[:, None]
            dchosen_TE = tl.where(here_TE, _at(dchosen_TK, place_K, place)[:, None], dchosen_TE)
    if not AFTER:
        dscores_TE += dchosen_TE
    if SIGMOID:
        dlogits_TE = dscores_TE * (1 - scores_TE) * scores_TE
    else:
        dlogits_TE = _softmax_backward(dscores_TE, scores_TE)
        if AFTER:
            dlogits_TE += dchosen_TE
        dlogits_TE = tl.where(logits_TE < LEAST, 0.0, dlogits_TE)  # an expert that is out
    tl.store(dlogits + at_TE, dlogits_TE, mask=inside_TE)


@triton.jit
def _at(values_TK, place_K, place):
    """The column of a place, [T]."""
    return tl.sum(tl.where(place_K[None, :] == place, values_TK, 0), axis=1)


@triton.jit
def _softmax_backward(dout, out):
    return out * (dout - tl.sum(dout * out, axis=1)[:, None])

"""Scores, choice and weights of a block of tokens, which read the logits once.

Tiles: T tokens, E columns (experts), K chosen; each padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import LEAST_KEY, first_best, keys, limit_to_groups, sigmoid, softmax


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    logits, bias, ids, weights, scores, tokens, experts, route_scale,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, AFTER: tl.constexpr, RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
):  # fmt: skip
    """``BLOCK_T`` tokens a program; the logits, ids, weights and scores are contiguous."""
    row_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column_E, place_K = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    real_1E = (column_E < experts)[None, :]
    inside_TE = (row_T < tokens)[:, None] & real_1E
    at_TE = row_T[:, None] * experts + column_E[None, :]
    logits_TE = tl.load(logits + at_TE, mask=inside_TE, other=0.0)
    scores_TE = sigmoid(logits_TE, real_1E) if SIGMOID else softmax(logits_TE, real_1E)
    tl.store(scores + at_TE, scores_TE, mask=inside_TE)
    selection_TE = scores_TE
    if HAS_BIAS:
        selection_TE += tl.load(bias + column_E, mask=column_E < experts, other=0.0)[None, :]
    key_TE = tl.where(real_1E, keys(selection_TE), LEAST_KEY)
    if TOP_GROUPS < GROUPS:
        key_TE = limit_to_groups(key_TE, column_E, real_1E, SIZE, GROUPS, BLOCK_M, TOP_GROUPS, TOP2)
    weighed_TE = logits_TE if AFTER else scores_TE
    ids_TK = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    weights_TK = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for place in range(TOP_K):
        _best_T, at_T = first_best(key_TE, column_E)
        here_TE = column_E[None, :] == at_T[:, None]
        key_TE = tl.where(here_TE, LEAST_KEY, key_TE)
        weight_T = tl.sum(tl.where(here_TE, weighed_TE, 0.0), axis=1)
        ids_TK = tl.where(place_K[None, :] == place, at_T[:, None], ids_TK)
        weights_TK = tl.where(place_K[None, :] == place, weight_T[:, None], weights_TK)
    chosen_TK = (row_T < tokens)[:, None] & (place_K < TOP_K)[None, :]
    if AFTER:
        weights_TK = softmax(weights_TK, (place_K < TOP_K)[None, :])
    elif RENORMALIZE:
        if TOP_K == 1:
            weights_TK = weights_TK * 0 + 1  # NaN stays NaN
        else:
            weights_TK = weights_TK / (tl.sum(weights_TK, axis=1) + 1e-20)[:, None]
    at_TK = row_T[:, None] * TOP_K + place_K[None, :]
    tl.store(ids + at_TK, ids_TK.to(tl.int64), mask=chosen_TK)
    tl.store(weights + at_TK, weights_TK * route_scale, mask=chosen_TK)

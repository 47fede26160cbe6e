"""Scores of logits, keys that order scores, and the choice of the best by them: parts of the kernels.

Tiles: T tokens, E columns (experts, padded to a power of two), M groups of experts likewise.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAST_KEY = tl.constexpr(-(2**31))  # below every score's key: -inf has -2139095041
LEAST = tl.constexpr(-3.4028234663852886e38)  # of finite fp32


@triton.jit
def softmax(logits_TE, real_1E):
    """Over the real columns; -inf is an expert that is out, and a row of them alone is uniform."""
    finite_TE = tl.where(logits_TE < LEAST, LEAST, logits_TE)  # a comparison that NaN passes through
    most_T = tl.max(tl.where(real_1E, finite_TE, LEAST), axis=1)
    powers_TE = tl.where(real_1E, tl.exp(finite_TE - most_T[:, None]), 0.0)
    return powers_TE / tl.sum(powers_TE, axis=1)[:, None]


@triton.jit
def sigmoid(logits_TE, real_1E):
    return tl.where(real_1E, 1 / (1 + tl.exp(-logits_TE)), 0.0)


@triton.jit
def keys(scores):
    """int32 that are ordered as the scores are, NaN above all; both zeros are one."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(scores == 0.0, 0, tl.where(scores != scores, 0x7FC00000, bits))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def of_keys(key):
    """The scores that keys stand for."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_best(key_TE, column_E):
    """(greatest key [T], its lowest column [T])."""
    best_T = tl.max(key_TE, axis=1)
    return best_T, tl.min(tl.where(key_TE == best_T[:, None], column_E[None, :], 1 << 30), axis=1)


@triton.jit
def limit_to_groups(
    key_TE, column_E, real_1E, SIZE: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr,
    TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr,
):  # fmt: skip
    """The key of -inf outside each token's best groups of ``SIZE`` columns."""
    group_E, group_M = column_E // SIZE, tl.arange(0, BLOCK_M)
    group_key_TM = tl.full((key_TE.shape[0], BLOCK_M), LEAST_KEY, tl.int32)
    for group in range(GROUPS):
        own_TE = tl.where(group_E[None, :] == group, key_TE, LEAST_KEY)
        best_T, at_T = first_best(own_TE, column_E)
        score_T = of_keys(best_T)
        if TOP2 and SIZE > 1:
            second_T = tl.max(tl.where(column_E[None, :] == at_T[:, None], LEAST_KEY, own_TE), axis=1)
            score_T += of_keys(second_T)
        group_key_TM = tl.where(group_M[None, :] == group, keys(score_T)[:, None], group_key_TM)
    kept_TE = column_E[None, :] < tl.zeros_like(key_TE)
    for _ in range(TOP_GROUPS):
        _best_T, at_T = first_best(group_key_TM, group_M)
        group_key_TM = tl.where(group_M[None, :] == at_T[:, None], LEAST_KEY, group_key_TM)
        kept_TE = kept_TE | (group_E[None, :] == at_T[:, None])
    out = keys(tl.full((), float("-inf"), tl.float32))
    return tl.where(real_1E, tl.where(kept_TE, key_TE, out), LEAST_KEY)

"""Inputs of attention's tests, and softmax written out as their oracle.

Shapes: B batch, S sequence, K keys, Q query heads, G key and value heads, H head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moetrain.ops.attention import AUTO, Case, SeenKeys, attend, plan_attention, seen_keys

BATCH, QUERY_HEADS, WIDTH = 2, 6, 5
KINDS = ("causal", "window", "documents", "window, documents")
CPU = torch.device("cpu")


def inputs(seq: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seq)
    return [
        torch.randn(BATCH, heads, seq, WIDTH, generator=generator, dtype=dtype).requires_grad_()
        for heads in (QUERY_HEADS, kv_heads, kv_heads)
    ]


def documents(seq: int) -> Tensor:
    """Row 0 of two documents of very different lengths; row 1 of documents that take turns."""
    return torch.stack([(torch.arange(seq) >= seq - 3).long(), torch.arange(seq) % 3])


def seen_of(kind: str, seq: int, window: int = 19) -> SeenKeys | None:
    docs = documents(seq) if kind.endswith("documents") else None
    return seen_keys(seq, 0, window if kind.startswith("window") else None, docs)


def case_of(tensors: Sequence[Tensor], seen: SeenKeys | None, dtype: torch.dtype | None = None) -> Case:
    q, k = tensors[:2]
    cached = k.shape[2] - q.shape[2]
    heads = (q.shape[1], k.shape[1])
    return Case(seen, q.shape[0], q.shape[2], cached, heads, q.shape[3], dtype or q.dtype, q.device)


def attended(
    tensors: Sequence[Tensor],
    seen: SeenKeys | None,
    backend: str = AUTO,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As the decoder does it: a plan, then the call."""
    return attend(*tensors, plan_attention(backend, case_of(tensors, seen, dtype)))


def all_pairs(seen: SeenKeys | None, seq: int) -> Tensor:
    """[B or 1, 1, S, K], by a loop over pairs."""
    if seen is None:
        return torch.ones(seq, seq).tril().bool()[None, None]
    docs = [[0] * seq] if seen.doc_ids_BS is None else seen.doc_ids_BS.tolist()
    window, cached = seen.window or seq + seen.cached, seen.cached
    return torch.tensor(
        [
            [
                [
                    k <= q < k + window and (seen.doc_ids_BS is None or row[q] == row[k])
                    for k in range(cached + seq)
                ]
                for q in range(cached, cached + seq)
            ]
            for row in docs
        ]
    )[:, None]


def written_out(tensors: Sequence[Tensor], seen: SeenKeys | None) -> Tensor:
    q, k, v = tensors[0], *(x.repeat_interleave(tensors[0].shape[1] // x.shape[1], 1) for x in tensors[1:])
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    scores = scores.masked_fill(~all_pairs(seen, q.shape[2]), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def rounding_bound(
    tensors: Sequence[Tensor], seen: SeenKeys | None, narrow: float, sums: float = 2**-24
) -> Tensor:
    """[B, S, Q, H]: how far rounding may take the output from the exact one, of exact inputs in fp64.

    ``narrow``: unit roundoff u of inputs, weights and output; ``sums``: that of the accumulations, over H
    elements and K keys. A score is off by d = (2 u + u^2 + (H + 2) sums) sum |q| |k| / sqrt(H) at most, so a
    weight, after the division by their sum, by a factor of exp(2 d), d being the largest of the query. The
    weight, the value and the output are rounded once each, and the sums of K keys K times, their divisor's
    too; exp itself is good to eight roundings:
        |y' - y| <= (exp(2 d) (1 + u)^3 (1 + sums)^(2 K + 8) - 1) sum p |v|.
    """
    q, k, v = tensors[0], *(x.repeat_interleave(tensors[0].shape[1] // x.shape[1], 1) for x in tensors[1:])
    hidden, width, keys = ~all_pairs(seen, q.shape[2]), q.shape[3], k.shape[2]
    off = (2 * narrow + narrow**2 + (width + 2) * sums) * (q.abs() @ k.abs().transpose(2, 3)) / width**0.5
    most = off.masked_fill(hidden, 0).amax(-1, keepdim=True)
    weights = (q @ k.transpose(2, 3) / width**0.5).masked_fill(hidden, float("-inf")).softmax(-1)
    rest = 3 * math.log1p(narrow) + (2 * keys + 8) * math.log1p(sums)
    return (torch.expm1(2 * most + rest) * (weights @ v.abs())).transpose(1, 2)


def assert_equal(
    ours: Callable[..., Tensor], tensors: list[Tensor], seen: SeenKeys | None, tolerance: float = 1e-12
) -> None:
    """Output and gradients."""
    expected, found = written_out(tensors, seen), ours(*tensors)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    dy = torch.randn(found.shape, dtype=found.dtype)
    for right, ours_ in zip(
        torch.autograd.grad(expected, tensors, dy), torch.autograd.grad(found, tensors, dy), strict=True
    ):
        torch.testing.assert_close(ours_, right, rtol=tolerance, atol=tolerance)

"""Product keys: the best of N = n^2 keys by two searches among n sub-keys.

A key is a pair of sub-keys, and its score for a query is the sum of two inner products, one for each half of
the query. The k best pairs lie among the k best of either half: fewer than k ln k + k of those pairs can be
among them at all, and only these are formed. Lample et al. 2019, arXiv:1907.05242, section 3.1.

Shapes: T tokens, D model, H heads, Q query width of one head, n sub-keys of a half, K keys of a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.assign import count_BE, tokens_per_sequence
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router
from moetrain.moe.routing import RoutingRecord
from moetrain.moe.running_norm import RunningNorm
from moetrain.moe.topk_ops import top_ids
from moetrain.ops.init import Constant, Normal, parameter
from moetrain.ops.linear import wide_linear
from moetrain.ops.uses import Use


class Chosen(NamedTuple):
    """The keys of each token: ``ids_THK`` from 0 to N - 1, best first, and their scores."""

    ids_THK: Tensor
    scores_THK: Tensor
    record: RoutingRecord


class ProductKeys(Router):
    """Queries of H heads, and the K best of N keys for each of them.

    ``own_keys``: every head has sub-keys of its own (Lample et al.); else all share them (He 2024).
    ``momentum``: queries are batch-normalised by running statistics (:class:`RunningNorm`, with a learnt gain
    and shift); None: they are not. The record counts the choices of each half's sub-keys: 2 n "experts".
    Raises ValueError where ``num_keys`` is no square, a head asks for more keys than there are, or the query
    has no halves.
    """

    has_scores = has_logits = False
    ranks_2P: Tensor

    def __init__(
        self,
        name: str,
        d_model: int,
        num_keys: int,
        heads: int,
        top_k: int,
        d_query: int,
        momentum: float | None,
        own_keys: bool,
    ) -> None:
        n = math.isqrt(num_keys)
        if n * n != num_keys:
            raise ValueError(
                f"model.num_experts={num_keys} must be a square, the pairs of two sets of sub-keys: "
                f"take {n * n} or {(n + 1) ** 2}"
            )
        if top_k > num_keys:
            raise ValueError(f"model.product_keys.top_k={top_k} exceeds model.num_experts={num_keys}")
        if d_query % 2:
            raise ValueError(f"model.product_keys.d_query={d_query} must be even: a query has two halves")
        super().__init__(d_model, 2 * n, RouterConfig(name=name))
        self.n, self.heads, self.keys_per_head = n, heads, top_k
        self.register_buffer("ranks_2P", best_ranks(top_k, n), persistent=False)
        self.w_query = parameter((heads * d_query, d_model), Normal(d_model**-0.5))
        # the spread of the uniform draw in Lample et al.'s code
        spread = Normal((3 * d_query / 2) ** -0.5)
        self.sub_keys = parameter((2 * (heads if own_keys else 1) * n, d_query // 2), spread)
        self.uses = {"sub_keys": Use(1.0, 1.0 if own_keys else float(heads))}
        self.norm: RunningNorm | None = None
        if momentum is not None:
            self.norm = RunningNorm(heads * d_query, momentum)
            self.gain = parameter((heads * d_query,), Constant(1.0))
            self.shift = parameter((heads * d_query,), Constant(0.0))

    def forward(self, x_TD: Tensor, ctx: RouterContext) -> Chosen:  # type: ignore[override]
        """The keys of each token, in fp32 at least."""
        with torch.autocast(x_TD.device.type, enabled=False):
            query = wide_linear(x_TD, self.w_query)
            stats = None
            if self.norm is not None:
                stats = self.norm.sums(query, ctx.valid_T) if self.training else None
                query = self.norm(query) * self.gain.to(query.dtype) + self.shift.to(query.dtype)
            half_scores = self._half_scores(query)
            ids_THK, scores_THK = best_pairs(*half_scores, self.keys_per_head, self.ranks_2P)
            return Chosen(ids_THK, scores_THK, self._record(ids_THK, ctx, stats))

    def after_step(self, stats: Tensor) -> None:
        """Move the statistics of queries by those of the step."""
        assert self.norm is not None
        self.norm.move(stats)

    def _half_scores(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Of each half, [T, H, n]."""
        tokens, width = len(query), self.sub_keys.shape[1]
        query_T2Hq = query.view(tokens, self.heads, 2, width).transpose(1, 2)
        keys_2Hnq = self.sub_keys.to(query.dtype).view(2, -1, self.n, width)
        if keys_2Hnq.shape[1] == 1:
            first, second = (F.linear(query_T2Hq[:, i], keys_2Hnq[i, 0]) for i in range(2))
        else:
            first, second = (torch.einsum("thq,hnq->thn", query_T2Hq[:, i], keys_2Hnq[i]) for i in range(2))
        return first, second

    def _record(self, ids_THK: Tensor, ctx: RouterContext, stats: Tensor | None) -> RoutingRecord:
        ids_TA = ids_THK.flatten(1)
        halves_TA = torch.cat([ids_TA // self.n, self.n + ids_TA % self.n], 1)
        return RoutingRecord(
            num_tokens_B=tokens_per_sequence(ctx),
            demand_BE=count_BE(halves_TA, ctx, 2 * self.n),
            valid_T=ctx.valid_T,
            stats=stats,
        )


def best_ranks(k: int, n: int) -> Tensor:
    """[2, P] int64: the ranks in either half of the pairs that can be among the k best of n^2."""
    kept = range(min(k, n))
    # a pair at ranks (i, j) has (i + 1)(j + 1) - 1 others above it
    return torch.tensor([(i, j) for i in kept for j in kept if (i + 1) * (j + 1) <= k]).T.contiguous()


def best_pairs(first: Tensor, second: Tensor, k: int, ranks_2P: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, scores) [..., k] of the k best pairs of two sets of n scores; the pair (i, j) is number i n + j.

    ``ranks_2P`` is of :func:`best_ranks`. Of equal sums the one whose first half is better comes first.
    Scores are differentiable, the choice is not.
    """
    n = first.shape[-1]
    ids = [top_ids(half.detach(), min(k, n)) for half in (first, second)]
    best = [half.gather(-1, which) for half, which in zip((first, second), ids, strict=True)]
    i_P, j_P = ranks_2P
    sums_P = best[0][..., i_P] + best[1][..., j_P]
    order_K = top_ids(sums_P.detach(), k)
    ids_P = ids[0][..., i_P] * n + ids[1][..., j_P]
    return ids_P.gather(-1, order_K), sums_P.gather(-1, order_K)

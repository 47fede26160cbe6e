"""MoEC: clusters of experts, some of which are left out for a while (Xie et al. 2022, arXiv:2207.09094).

Shapes: T tokens, E experts, C clusters, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Optional

import torch
from torch import Tensor

from moetrain.bounds import at_least, within
from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.routers.base import register
from moetrain.moe.routers.cosine import CosineOptions, CosineRouter
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids

_SALT = 0x30EC
_CLUSTERS = 8


@dataclass(frozen=True)
class MoECOptions(CosineOptions):
    name: str = "moec"
    top_k: Optional[int] = 1
    width: Optional[int] = field(default=32, metadata=at_least(1, 2**24))  # of the routing space
    # consecutive experts form one; null: 8, or half as many as experts where these are few
    clusters: Optional[int] = field(default=None, metadata=at_least(1))
    # training only: the share of each cluster's experts that is left out, rounded down
    dropout: float = field(default=0.5, metadata=within(0, 1, open_high=True))
    period: int = field(default=250, metadata=at_least(1))  # steps until others are left out


@register("moec", MoECOptions, "Xie et al. 2022, arXiv:2207.09094", "k experts a token, of those in")
class MoECRouter(CosineRouter):
    """The cosine router over the experts that are in: a function of (seed, step // period, layer).

    The Routing's penalty is, as a mean over tokens, the share of the variance of a token's probabilities that
    lies within clusters: 0 where all experts of a cluster are as likely, 1 where all clusters are. Only
    experts that are in count; the others have no tokens, no gradient, and probability 0. Logits are of all.

    Raises ValueError for more clusters than experts, and for a ``top_k`` above the number of experts in.
    """

    options: MoECOptions
    takes_best = replays = False  # it chooses among the experts that are in
    has_penalty = True
    cluster_E: Tensor
    num_in_C: Tensor

    def __init__(self, d_model: int, num_experts: int, options: MoECOptions) -> None:
        super().__init__(d_model, num_experts, options)
        clusters = min(_CLUSTERS, max(1, num_experts // 2)) if options.clusters is None else options.clusters
        if clusters > num_experts:
            raise ValueError(f"router.clusters={clusters} exceeds num_experts={num_experts}: lower it")
        cluster_of = [e * clusters // num_experts for e in range(num_experts)]
        sizes = [cluster_of.count(c) for c in range(clusters)]
        num_in = [size - int(options.dropout * size) for size in sizes]
        if self.top_k > sum(num_in):
            raise ValueError(
                f"router.top_k={self.top_k} exceeds the {sum(num_in)} experts that "
                f"router.dropout={options.dropout} leaves in"
            )
        self.register_buffer("cluster_E", torch.tensor(cluster_of), persistent=False)
        self.register_buffer("num_in_C", torch.tensor(num_in), persistent=False)

    def survivors(self, ctx: RouterContext) -> Tensor:
        """The experts that are in, bool [E]: of each cluster those of the largest draws."""
        device = ctx.sample_ids_B.device
        if not self.training:
            return torch.ones(self.num_experts, dtype=torch.bool, device=device)
        drawn_E = ctx.common_uniform(self.num_experts, ctx.step // self.options.period, _SALT)
        places_E = torch.arange(self.num_experts, device=device)
        tied_EE = (drawn_E[:, None] == drawn_E) & (places_E[:, None] > places_E)
        above_EE = (drawn_E[:, None] < drawn_E) | tied_EE
        rank_E = (above_EE & (self.cluster_E[:, None] == self.cluster_E)).sum(1)
        return rank_E < self.num_in_C[self.cluster_E]

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        out_E = ~self.survivors(ctx)
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE.masked_fill(out_E, float("-inf")))
        ids_TK = top_ids((scores_TE.detach() + self.bias_E).masked_fill(out_E, float("-inf")), self.top_k)
        weights_TK = scores_TE.gather(-1, ids_TK)
        routing = from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, scores_TE, logits_TE)
        within_T = self._within(scores_TE, ~out_E)
        if ctx.valid_T is not None:
            within_T = within_T.where(ctx.valid_T, 0.0)
        return replace(routing, penalty=within_T.sum() / routing.num_tokens.clamp(min=1))

    def _within(self, p_TE: Tensor, in_E: Tensor) -> Tensor:
        """The share of the variance of ``p_TE``, among the experts that are in, within clusters, [T]."""
        clusters_C = torch.arange(len(self.num_in_C), device=p_TE.device)
        member_EC = (self.cluster_E[:, None] == clusters_C).to(p_TE.dtype)
        member_EC = member_EC * in_E[:, None]
        mean_TC = (p_TE @ member_EC) / member_EC.sum(0)
        within_T = ((p_TE - mean_TC @ member_EC.t()) * in_E).square().sum(-1)
        mean_T1 = p_TE.sum(-1, keepdim=True) / in_E.sum()
        total_T = ((p_TE - mean_T1) * in_E).square().sum(-1)
        return within_T / (total_T + torch.finfo(p_TE.dtype).eps)

"""Sinkhorn routing: the k best of a balanced plan (S-BASE; Clark et al. 2022, arXiv:2202.01169).

Training selects by the plan of each routing group, evaluation by the logits. Not causal in training.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

from moetrain.bounds import within
from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words, token_choice
from moetrain.moe.groups import by_group
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.solvers import sinkhorn_plan
from moetrain.moe.topk_ops import softmax, top_ids

# of a share in the plan: what differs by less is alike, and the token's own scores decide. A group of one
# token has an even plan, whose last bits no layout agrees on
_STEPS = 2**20


@dataclass(frozen=True)
class SinkhornOptions(RouterConfig):
    name: str = "sinkhorn"
    top_k: Optional[int] = None
    # relative, of every expert's share of the plan
    tolerance: float = field(default=1.0e-3, metadata=within(0, 1, open_low=True, open_high=True))

    def evaluation_rule(self, num_experts: int) -> Words:
        top_k = resolve_top_k(self.top_k, num_experts)
        return token_choice(top_k, select="logits", score="sigmoid" if top_k == 1 else "softmax")


@register("sinkhorn", SinkhornOptions, "Clark et al. 2022, arXiv:2202.01169", "k experts a token")
class SinkhornRouter(LinearRouter):
    """Weights are sigmoid(logit) for k = 1, else the softmax over all experts; the plan has no gradient."""

    top_k: int
    causal = False

    def __init__(self, d_model: int, num_experts: int, options: SinkhornOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        selection_TE = logits_TE.detach()
        if self.training:
            tolerance = self.options.tolerance  # type: ignore[attr-defined]
            groups = by_group(selection_TE, ctx, self.options.group)
            plan_TE = groups.own(sinkhorn_plan(groups.values_GLC, groups.valid_GL, tolerance))
            selection_TE = torch.round(plan_TE.double() * _STEPS) + scores_TE.detach().double() / 2
        ids_TK = top_ids(selection_TE, self.top_k)
        weights_TE = torch.sigmoid(logits_TE) if self.top_k == 1 else scores_TE
        return from_token_choice(
            ids_TK, weights_TE.gather(-1, ids_TK), ctx, self.num_experts, scores_TE, logits_TE
        )

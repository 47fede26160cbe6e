"""A plug-in router, that of docs/routers.md: ``plugins=[own_router]``, ``router=top_p``.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moetrain.moe import RouterContext, Routing
from moetrain.moe.assign import from_mask
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers import LinearRouter, register
from moetrain.moe.topk_ops import softmax


@dataclass(frozen=True)
class TopPOptions(RouterConfig):
    name: str = "top_p"
    floor: float = 0.2  # experts of at least this share of the best one's probability


@register("top_p", TopPOptions)
class TopPRouter(LinearRouter):
    options: TopPOptions

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        best_T1 = scores_TE.detach().amax(-1, keepdim=True)
        mask_TE = scores_TE.detach() >= self.options.floor * best_T1
        return from_mask(mask_TE, scores_TE, ctx, scores_TE, logits_TE)

"""ReLU routing (ReMoE; Wang et al. 2024, arXiv:2412.14711): an expert is active where its score is positive.

Fully differentiable in the scores; how many experts are active is held by a loss whose coefficient a
controller moves (``balance=remoe``). At the start about half of all experts are active; until they are at
most twice as many as in the end, they are computed in rounds, which bounds memory and changes no result.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from torch import Tensor

from moetrain.moe.assign import from_mask
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing


@dataclass(frozen=True)
class ReLUOptions(RouterConfig):
    name: str = "relu"
    top_k: Optional[int] = None  # the mean number of experts a token that the controller aims at

    def evaluation_rule(self, num_experts: int) -> Words:
        return {"rule": "relu"}


@register("relu", ReLUOptions, "Wang et al. 2024, arXiv:2412.14711", "any number of experts a token")
class ReLURouter(LinearRouter):
    """Weights are relu(W x), not normalised. A NaN counts as active, so that the step's loss shows it."""

    target_k: int

    def __init__(self, d_model: int, num_experts: int, options: ReLUOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.target_k = resolve_top_k(options.top_k, num_experts)
        self.usual_rows_per_token = 2.0 * self.target_k

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.relu()
        return from_mask(scores_TE.detach() != 0, scores_TE, ctx, scores_TE, logits_TE)

"""Threshold routing: the fewest experts whose probabilities reach a sum (XMoE; Yang et al. 2024,
arXiv:2403.18926).

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moetrain.bounds import within
from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words, token_choice
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids


@dataclass(frozen=True)
class ThresholdOptions(RouterConfig):
    name: str = "threshold"
    threshold: float = field(default=0.9, metadata=within(0, 1))

    def evaluation_rule(self, num_experts: int) -> Words:
        return token_choice(num_experts, select="scores", threshold=self.threshold)


@register("threshold", ThresholdOptions, "Yang et al. 2024, arXiv:2403.18926", "one or more experts a token")
class ThresholdRouter(LinearRouter):
    """Experts by falling probability while those before them sum to less than ``threshold``; raw weights.

    A capacity is the factor times a group's tokens over E, however many experts they take, as in the authors'
    code (``main_thresholdGating``).
    """

    capacity_of_tokens = True

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        ids_TE = top_ids(scores_TE.detach(), self.num_experts)
        weights_TE = scores_TE.gather(-1, ids_TE)
        before_TE = weights_TE.detach().cumsum(-1) - weights_TE.detach()
        before_TE[:, 0] = -1.0  # always one expert
        enough_TE = before_TE >= self.options.threshold  # type: ignore[attr-defined]
        return from_token_choice(
            ids_TE.masked_fill(enough_TE, self.num_experts), weights_TE, ctx, self.num_experts, scores_TE,
            logits_TE, ragged=True,
        )  # fmt: skip

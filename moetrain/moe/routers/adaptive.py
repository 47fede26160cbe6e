"""Adaptive gating: a second expert only where the first is unsure (Li et al. 2023, arXiv:2310.07188).

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words, token_choice
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids


@dataclass(frozen=True)
class AdaptiveOptions(RouterConfig):
    name: str = "adaptive"
    margin: float = 0.1  # two experts where the best two probabilities differ by at most this

    def evaluation_rule(self, num_experts: int) -> Words:
        return token_choice(min(2, num_experts), margin=self.margin)


@register("adaptive", AdaptiveOptions, "Li et al. 2023, arXiv:2310.07188", "one or two experts a token")
class AdaptiveRouter(LinearRouter):
    """Softmax over all experts; the raw probabilities are the weights."""

    top_k = 2
    reads_bias = True

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        ids_TK = top_ids(scores_TE.detach() + self.bias_E, min(2, self.num_experts))
        weights_TK = scores_TE.gather(-1, ids_TK)
        if self.num_experts > 1:
            best_T, second_T = weights_TK.detach().unbind(-1)
            sure_T = best_T - second_T > self.options.margin  # type: ignore[attr-defined]
            ids_TK = ids_TK.clone()
            ids_TK[:, 1].masked_fill_(sure_T, self.num_experts)
        return from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, scores_TE, logits_TE, ragged=True)

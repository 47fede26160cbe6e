"""Dense training, sparse evaluation (DS-MoE; Pan et al. 2024, arXiv:2404.05567).

Shapes: T tokens, E experts, K experts a token in evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from moetrain.moe.assign import from_mask, from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words, token_choice
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids


@dataclass(frozen=True)
class DenseOptions(RouterConfig):
    name: str = "dense"
    eval_top_k: Optional[int] = None  # null: 2, or 1 where there is one expert

    def evaluation_rule(self, num_experts: int) -> Words:
        return token_choice(resolve_top_k(self.eval_top_k, num_experts), select="scores")


@register("dense", DenseOptions, "Pan et al. 2024, arXiv:2404.05567", "every expert; k in evaluation")
class DenseRouter(LinearRouter):
    """Softmax over all experts as weights, of all of them in training and of the k best in evaluation."""

    def __init__(self, d_model: int, num_experts: int, options: DenseOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.eval_top_k = resolve_top_k(options.eval_top_k, num_experts)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        if self.training:
            mask_TE = torch.ones_like(scores_TE, dtype=torch.bool)
            return from_mask(mask_TE, scores_TE, ctx, scores_TE, logits_TE)
        ids_TK = top_ids(scores_TE, self.eval_top_k)
        return from_token_choice(
            ids_TK, scores_TE.gather(-1, ids_TK), ctx, self.num_experts, scores_TE, logits_TE
        )

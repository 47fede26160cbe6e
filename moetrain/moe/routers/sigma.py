"""Sigma-MoE: sigmoid scores without competition, expert dropout (Csordas et al. 2023, arXiv:2310.10837).

Taken with ``balance=sigma``, its entropy regulariser. Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from torch import Tensor

from moetrain.bounds import within
from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words, token_choice
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids
from moetrain.ops.init import EqualRows, Initializer

_SALT = 0x51A


@dataclass(frozen=True)
class SigmaOptions(RouterConfig):
    name: str = "sigma"
    top_k: Optional[int] = None
    # training only: probability that an expert is left out of a token's choice
    expert_dropout: float = field(default=0.0, metadata=within(0, 1, open_high=True))

    def evaluation_rule(self, num_experts: int) -> Words:
        return token_choice(resolve_top_k(self.top_k, num_experts), score="sigmoid")

    def combine(self, num_experts: int) -> Combine:
        return Combine(drops=self.drops, own_scores=True)


@register("sigma", SigmaOptions, "Csordas et al. 2023, arXiv:2310.10837", "k experts a token")
class SigmaRouter(LinearRouter):
    """Weights are sigmoid(logits). Scores are the softmax of the logits, which the entropy regulariser reads.

    Dropout leaves each expert out of each token's choice by itself; where fewer than k are left, the best of
    those left out are chosen all the same. At the start all experts' rows have one norm.
    """

    top_k: int
    reads_bias = True
    replays = True

    def __init__(self, d_model: int, num_experts: int, options: SigmaOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)

    @staticmethod
    def first_weights(d_model: int) -> Initializer:
        return EqualRows(d_model**-0.5)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        selection_TE = logits_TE.detach().sigmoid() + self.bias_E
        rate = self.options.expert_dropout  # type: ignore[attr-defined]
        if self.training and rate:
            noise_TE = ctx.uniform((ctx.batch * ctx.seq, self.num_experts), _SALT)
            selection_TE = selection_TE - 4.0 * (noise_TE < rate)  # still chosen if too few are left
        ids_TK = top_ids(selection_TE, self.top_k) if ctx.forced_TK is None else ctx.forced_TK
        weights_TK = logits_TE.gather(-1, ids_TK).sigmoid()
        return from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, softmax(logits_TE), logits_TE)

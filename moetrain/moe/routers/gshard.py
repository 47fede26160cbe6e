"""GShard's top-2 with a random second expert (Lepikhin et al. 2020, arXiv:2006.16668).

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words, token_choice
from moetrain.moe.options import DropOrder, RouterConfig
from moetrain.moe.routers.base import LinearRouter, register
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import first_max, softmax

_GUMBEL_SALT, _KEEP_SALT = 0x65D1, 0x65D2


class Second(Enum):
    """``all``: the second best, always; ``sampling``: drawn by Gumbel noise in training; ``random``: the
    second best, kept in training with probability min(1, 2 g2), g2 its normalised weight."""

    all = "all"
    sampling = "sampling"
    random = "random"


@dataclass(frozen=True)
class GShardOptions(RouterConfig):
    name: str = "gshard"
    second: Second = Second.random
    drop_order: DropOrder = DropOrder.choice

    def evaluation_rule(self, num_experts: int) -> Words:
        return token_choice(min(2, num_experts), select="logits", weights="sum_to_1")


@register("gshard", GShardOptions, "Lepikhin et al. 2020, arXiv:2006.16668", "one or two experts a token")
class GShardRouter(LinearRouter):
    """g1 and g2 are the two probabilities over their sum; a dropped second does not change g1."""

    top_k = 2

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        first_T = first_max(scores_TE.detach())
        if self.num_experts == 1:
            return from_token_choice(first_T[:, None], scores_TE, ctx, 1, scores_TE, logits_TE)
        second_T = self._second(logits_TE.detach(), first_T, ctx)
        ids_T2 = torch.stack([first_T, second_T], dim=-1)
        weights_T2 = scores_TE.gather(-1, ids_T2)
        weights_T2 = weights_T2 / (weights_T2.sum(-1, keepdim=True) + 1e-20)
        if self.training and self.options.second is Second.random:  # type: ignore[attr-defined]
            keep_T = ctx.uniform((x_TD.shape[0],), _KEEP_SALT) < 2 * weights_T2[:, 1].detach()
            ids_T2 = torch.stack([first_T, second_T.where(keep_T, self.num_experts)], dim=-1)
        return from_token_choice(ids_T2, weights_T2, ctx, self.num_experts, scores_TE, logits_TE, ragged=True)

    def _second(self, logits_TE: Tensor, first_T: Tensor, ctx: RouterContext) -> Tensor:
        if self.training and self.options.second is Second.sampling:  # type: ignore[attr-defined]
            noise_TE = ctx.uniform(tuple(logits_TE.shape), _GUMBEL_SALT).to(logits_TE.dtype)
            logits_TE = logits_TE - torch.log(-torch.log(noise_TE))
        # the first is taken out below -inf, so that it is not chosen again where all others are -inf
        ranked_TE = logits_TE.clamp(min=torch.finfo(logits_TE.dtype).min)
        return first_max(ranked_TE.scatter(-1, first_T[:, None], float("-inf")))

"""Cosine routing on a low-dimensional hypersphere (X-MoE; Chi et al. 2022, arXiv:2204.09179).

Shapes: T tokens, D model, E experts, d routing width, K top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.bounds import at_least
from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words, token_choice
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids
from moetrain.ops.init import Constant, Normal, parameter

_MAX_INVERSE = math.log(100.0)  # of log(1 / temperature), as CLIP's


@dataclass(frozen=True)
class CosineOptions(RouterConfig):
    name: str = "cosine"
    top_k: Optional[int] = None
    # of the routing space; null: half the experts, at least 2
    width: Optional[int] = field(default=None, metadata=at_least(1, 2**24))
    temperature: float = field(default=0.07, metadata=at_least(0.01))  # where the learnt one starts

    def evaluation_rule(self, num_experts: int) -> Words:
        top_k = resolve_top_k(self.top_k, num_experts)
        return token_choice(top_k) | {"width": self.routing_width(num_experts)}

    def routing_width(self, num_experts: int) -> int:
        return max(2, num_experts // 2) if self.width is None else self.width


@register("cosine", CosineOptions, "Chi et al. 2022, arXiv:2204.09179", "k experts a token")
class CosineRouter(Router):
    """logits = cos(W x, c_e) / temperature, both sides normalised; softmax over all experts."""

    top_k: int
    reads_bias = True
    replays = True
    takes_best = True

    def __init__(self, d_model: int, num_experts: int, options: CosineOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)
        width = options.routing_width(num_experts)
        self.project_dD = parameter((width, d_model), Normal(d_model**-0.5))
        self.centers_Ed = parameter((num_experts, width), Normal(1.0))
        self.log_inverse_temperature_1 = parameter((1,), Constant(-math.log(options.temperature)))

    def rows_ED(self) -> Tensor:
        return self.centers_Ed

    def logits(self, x_TD: Tensor) -> Tensor:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        v_Td = F.normalize(F.linear(x_TD.to(dtype), self.project_dD.to(dtype)), dim=-1)
        inverse_1 = self.log_inverse_temperature_1.to(dtype).clamp(max=_MAX_INVERSE).exp()
        return F.linear(v_Td, F.normalize(self.centers_Ed.to(dtype), dim=-1)) * inverse_1

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        ids_TK = ctx.forced_TK
        if ids_TK is None:
            ids_TK = top_ids(scores_TE.detach() + self.bias_E, self.top_k)
        weights_TK = scores_TE.gather(-1, ids_TK)
        return from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, scores_TE, logits_TE)

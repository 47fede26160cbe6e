"""Random and forced routing: a baseline for every learnt router, and known loads for benchmarks and tests.

Shapes: T tokens, E experts, K top-k. THOR (Zuo et al. 2022, arXiv:2110.04260) shows how good random can be.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

import torch
from torch import Tensor

from moetrain.bounds import at_least
from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import top_ids

_SALT = 0xA11D


class Draw(Enum):
    """``random``: k different experts, drawn by ``zipf``; ``uniform``: in turn by position, exactly even."""

    random = "random"
    uniform = "uniform"


@dataclass(frozen=True)
class RandomOptions(RouterConfig):
    name: str = "random"
    top_k: Optional[int] = None
    draw: Draw = Draw.random
    # expert e is drawn in proportion to 1 / (e + 1)^zipf; 0: all alike
    zipf: float = field(default=0.0, metadata=at_least(0))

    def combine(self, num_experts: int) -> Combine:
        k = resolve_top_k(self.top_k, num_experts)
        return Combine(top_k=k, even_weight=1 / k, total=1.0, drops=self.drops)


@register("random", RandomOptions, "a baseline", "k experts a token, by chance")
class RandomRouter(Router):
    """Weights 1 / k. The draw follows (seed, step, layer, sample, position); no parameters, no scores."""

    top_k: int
    has_scores = has_logits = False

    def __init__(self, d_model: int, num_experts: int, options: RandomOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        options, num_experts = self.options, self.num_experts
        assert isinstance(options, RandomOptions)
        if options.draw is Draw.uniform:
            turn_K = torch.arange(self.top_k, device=x_TD.device)
            ids_TK = (ctx.positions_T[:, None] * self.top_k + turn_K) % num_experts
        else:  # Gumbel top-k: k draws without replacement
            noise_TE = ctx.uniform((x_TD.shape[0], num_experts), _SALT)
            rank_E = torch.arange(1, num_experts + 1, device=x_TD.device).float()
            ids_TK = top_ids(-options.zipf * rank_E.log() - torch.log(-torch.log(noise_TE)), self.top_k)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        weights_TK = torch.full(ids_TK.shape, 1 / self.top_k, dtype=dtype, device=ids_TK.device)
        return from_token_choice(ids_TK, weights_TK, ctx, num_experts)

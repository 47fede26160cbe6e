"""Hash routing: the expert is a fixed function of the token's id (Roller et al. 2021, arXiv:2106.04426).

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext, mix
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router, register, resolve_top_k
from moetrain.moe.routing import Routing


@dataclass(frozen=True)
class HashOptions(RouterConfig):
    name: str = "hash"
    top_k: Optional[int] = None  # different experts for one id, of weight 1 / k each
    salt: int = 0  # another table


@register(
    "hash", HashOptions, "Roller et al. 2021, arXiv:2106.04426", "k experts of a token id", scores=False
)
class HashRouter(Router):
    """A pseudo-random table, computed and not stored. No parameters, no scores, no balance loss.

    Raises ValueError where the context has no token ids.
    """

    def __init__(self, d_model: int, num_experts: int, options: HashOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        if ctx.token_ids_T is None:
            raise ValueError("router=hash needs token ids: give the layer a RouterContext with token_ids_T")
        # The h-th best of E hashes: k different experts, each uniform.
        key_T = mix(ctx.token_ids_T.to(torch.int64) + mix(ctx.token_ids_T.new_tensor(self.options.salt)))  # type: ignore[attr-defined]
        key_TE = mix(key_T[:, None] + torch.arange(self.num_experts, device=key_T.device))
        ids_TK = key_TE.topk(self.top_k, dim=-1).indices
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        weights_TK = torch.full(ids_TK.shape, 1 / self.top_k, dtype=dtype, device=ids_TK.device)
        return from_token_choice(ids_TK, weights_TK, ctx, self.num_experts)

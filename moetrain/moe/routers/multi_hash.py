"""MultiHash: a token's network is put together from parts of several experts, by as many hashes of its id.

The experts are K parts of P = E / K each, and hash m picks one of part m. With weights of 1 the sum of K
networks of F / K hidden units is one network of F, whose hidden units come from K places: the segments of the
paper, which concatenates them. (Roller et al. 2021, arXiv:2106.04426; see :class:`MultiHashRouter`.)

Shapes: T tokens, E experts, K hashes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from moetrain.arithmetic import divisor_near
from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router, register, resolve_top_k
from moetrain.moe.routers.hashed import expert_keys
from moetrain.moe.routing import Routing

_MOST_HASHES = 4  # of the default


@dataclass(frozen=True)
class MultiHashOptions(RouterConfig):
    name: str = "multi_hash"
    top_k: Optional[int] = None  # hashes, and parts of the experts; null: the most up to 4 that divide these
    salt: int = 0  # other tables

    def expert_groups(self) -> int:
        return self.top_k or 1

    def hashes_of(self, num_experts: int) -> int:
        """The number of hashes K; it is not checked that K divides the experts."""
        if self.top_k is not None:
            return resolve_top_k(self.top_k, num_experts)
        return max(k for k in range(1, _MOST_HASHES + 1) if num_experts % k == 0)

    def combine(self, num_experts: int) -> Combine:
        k = self.hashes_of(num_experts)
        return Combine(top_k=k, even_weight=1.0, total=float(k), drops=self.drops)


@register(
    "multi_hash", MultiHashOptions, "Roller et al. 2021, arXiv:2106.04426", "a part of a network a hash"
)
class MultiHashRouter(Router):
    """One expert of each part, by a hash of its own of the token's id; all weights are 1.

    The part of a network that a hash picks is a segment of hidden units with its rows of both matrices. Of
    the paper the equations were not at hand: as it is restated, the first matrix is cut so, and the output
    of the second is concatenated from segments as well, each of which reads all hidden units. The authors'
    code (ParlAI's ``hash_ladder.py``) has one hash. No parameters, no scores, no balance loss.

    Raises ValueError where the context has no token ids, and where K does not divide E.
    """

    options: MultiHashOptions
    top_k: int
    has_scores = has_logits = False

    def __init__(self, d_model: int, num_experts: int, options: MultiHashOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = options.hashes_of(num_experts)
        if num_experts % self.top_k:
            raise ValueError(
                f"router.top_k={self.top_k} hashes must divide num_experts={num_experts}: "
                f"take {divisor_near(num_experts, self.top_k)}"
            )

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        if ctx.token_ids_T is None:
            raise ValueError(
                "router=multi_hash needs token ids: give the layer a RouterContext with token_ids_T"
            )
        ids_T = ctx.token_ids_T.to(torch.int64)
        number, size = self.top_k, self.num_experts // self.top_k
        first = self.options.salt * number
        ids_TK = torch.stack(
            [m * size + expert_keys(ids_T, size, first + m).argmax(-1) for m in range(number)], dim=-1
        )
        weights_TK = torch.ones(
            ids_TK.shape, dtype=torch.promote_types(x_TD.dtype, torch.float32), device=ids_TK.device
        )
        return from_token_choice(ids_TK, weights_TK, ctx, self.num_experts)

"""Expert prototyping: k top-1 routers, each over a part of the experts (M6-T; Yang et al. 2021).

Source: arXiv:2105.15082, of which the abstract was read, and the gate ``KTop1Gate`` of PKU-DAIR/Hetu, which
is not the authors' code.

Shapes: T tokens, E experts, K prototypes of P = E / K experts each.
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
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import first_max, softmax


@dataclass(frozen=True)
class PrototypesOptions(RouterConfig):
    name: str = "prototypes"
    top_k: Optional[int] = None  # prototypes; null: 2 where that divides the experts, else 1

    def expert_groups(self) -> int:
        return self.top_k or 1

    def prototypes_of(self, num_experts: int) -> int:
        """The number of prototypes K; it is not checked that K divides the experts."""
        if self.top_k is None:
            return 1 if num_experts % 2 else 2
        return resolve_top_k(self.top_k, num_experts)

    def combine(self, num_experts: int) -> Combine:
        k = self.prototypes_of(num_experts)
        one_each = k == num_experts
        return Combine(top_k=k, even_weight=k / num_experts, total=k if one_each else None, drops=self.drops)


@register(
    "prototypes", PrototypesOptions, "Yang et al. 2021, arXiv:2105.15082", "one expert of each prototype"
)
class PrototypesRouter(LinearRouter):
    """Prototype j has the experts j P to (j + 1) P - 1: a softmax over these, of which the best is taken.

    Weights are the probabilities; scores are those of all prototypes, so that they sum to K a token. With
    them the loss ``sum_over_k`` is the sum of the prototypes' own Switch losses. Raises ValueError where K
    does not divide E.
    """

    options: PrototypesOptions
    top_k: int
    reads_bias = True

    def __init__(self, d_model: int, num_experts: int, options: PrototypesOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = options.prototypes_of(num_experts)
        if num_experts % self.top_k:
            raise ValueError(
                f"router.top_k={self.top_k} prototypes must divide num_experts={num_experts}: "
                f"take {divisor_near(num_experts, self.top_k)}"
            )

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        apart = (self.top_k, self.num_experts // self.top_k)
        scores_TE = softmax(logits_TE.unflatten(-1, apart)).flatten(-2)
        best_TK = first_max((scores_TE.detach() + self.bias_E).unflatten(-1, apart))
        ids_TK = best_TK + torch.arange(0, self.num_experts, apart[1], device=best_TK.device)
        weights_TK = scores_TE.gather(-1, ids_TK)
        return from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, scores_TE, logits_TE)

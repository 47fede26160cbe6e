"""BlockFFN's router: ReLU, then RMSNorm over the experts (Song et al. 2025, arXiv:2507.08771).

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from moetrain.moe.assign import from_mask
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.ops.init import Constant, parameter


@dataclass(frozen=True)
class BlockFFNOptions(RouterConfig):
    name: str = "blockffn"
    eps: float = 1.0e-6
    # under ReMoE's loss: the mean number of experts a token that its controller aims at; null: 2
    top_k: Optional[int] = None

    def evaluation_rule(self, num_experts: int) -> Words:
        return {"rule": "blockffn", "eps": self.eps}


@register("blockffn", BlockFFNOptions, "Song et al. 2025, arXiv:2507.08771", "any number of experts a token")
class BlockFFNRouter(LinearRouter):
    """ReLU decides who is active, RMSNorm with a learnt scale how much; scores are before the norm.

    A NaN counts as active, so that the loss of the step shows it.
    """

    target_k: int

    def __init__(self, d_model: int, num_experts: int, options: BlockFFNOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.target_k = resolve_top_k(options.top_k, num_experts)
        self.scale_E = parameter((num_experts,), Constant(1.0))

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.relu()
        eps = self.options.eps  # type: ignore[attr-defined]
        inverse_T1 = torch.rsqrt(scores_TE.square().mean(-1, keepdim=True) + eps)
        weights_TE = scores_TE * inverse_T1 * self.scale_E.to(scores_TE.dtype)
        return from_mask(scores_TE.detach() != 0, weights_TE, ctx, scores_TE, logits_TE)

"""Noisy top-k gating (Shazeer et al. 2017, arXiv:1701.06538, section 2.1 and appendix A).

Shapes: T tokens, D model, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.bounds import above
from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.evaluation import Words, token_choice
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids
from moetrain.ops.init import Constant, parameter, set_initializer

_SALT = 0x2015


@dataclass(frozen=True)
class NoisyTopKOptions(RouterConfig):
    name: str = "noisy_topk"
    top_k: Optional[int] = None
    # added to the learnt standard deviation
    noise_floor: float = field(default=0.01, metadata=above(0))

    def evaluation_rule(self, num_experts: int) -> Words:
        return token_choice(resolve_top_k(self.top_k, num_experts), select="logits", weights="softmax")

    def combine(self, num_experts: int) -> Combine:
        k = resolve_top_k(self.top_k, num_experts)
        return Combine(top_k=k, even_weight=1 / k, total=1.0, drops=self.drops)


@register("noisy_topk", NoisyTopKOptions, "Shazeer et al. 2017, arXiv:1701.06538", "k experts a token")
class NoisyTopKRouter(LinearRouter):
    """Softmax over the k best noisy logits. Both maps start at zero, so that all experts start equal.

    ``load_TE`` is the probability that the expert is chosen again if its own noise alone is drawn anew; in
    evaluation, where there is no noise, there is none.
    """

    top_k: int

    def __init__(self, d_model: int, num_experts: int, options: NoisyTopKOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)
        set_initializer(self.weight_ED, Constant(0.0))
        self.noise_weight_ED = parameter((num_experts, d_model), Constant(0.0))

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        clean_TE = self.logits(x_TD)
        if not self.training:
            return self._choose(clean_TE, clean_TE, None, ctx)
        dtype = clean_TE.dtype
        std_TE = F.softplus(F.linear(x_TD.to(dtype), self.noise_weight_ED.to(dtype)))
        std_TE = std_TE + self.options.noise_floor  # type: ignore[attr-defined]
        normal_TE = torch.special.ndtri(ctx.uniform(tuple(clean_TE.shape), _SALT).to(dtype))
        noisy_TE = clean_TE + std_TE * normal_TE
        return self._choose(noisy_TE, clean_TE, self._load(noisy_TE, clean_TE, std_TE), ctx)

    def _choose(
        self, noisy_TE: Tensor, clean_TE: Tensor, load_TE: Tensor | None, ctx: RouterContext
    ) -> Routing:
        ids_TK = top_ids(noisy_TE.detach(), self.top_k)
        weights_TK = softmax(noisy_TE.gather(-1, ids_TK))
        routing = from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, softmax(noisy_TE), clean_TE)
        return replace(routing, load_TE=load_TE)

    def _load(self, noisy_TE: Tensor, clean_TE: Tensor, std_TE: Tensor) -> Tensor:
        """Phi((clean - threshold) / std): the threshold is the k-th best of the other noisy logits."""
        k = self.top_k
        if k == self.num_experts:
            return torch.ones_like(clean_TE)
        best_TK1 = noisy_TE.gather(-1, top_ids(noisy_TE.detach(), k + 1))
        chosen_TE = torch.zeros_like(noisy_TE, dtype=torch.bool)
        chosen_TE.scatter_(-1, top_ids(noisy_TE.detach(), k), True)
        threshold_TE = torch.where(chosen_TE, best_TK1[:, k : k + 1], best_TK1[:, k - 1 : k])
        load_TE: Tensor = torch.special.ndtr((clean_TE - threshold_TE) / std_TE)
        return load_TE

"""DSelect-k: k smooth selectors, each a binary code of an expert (Hazimeh et al. 2021, arXiv:2106.03760).

A selector has log2 E smooth binary choices; while these lie between 0 and 1 it spreads over several experts,
so that training begins dense, and its entropy, the router's penalty, makes it choose. Follows the gate for
single examples of the code released with COMET (mazumder-lab/COMET), which is the authors' own, adapted.

Shapes: T tokens, D model, E experts, K selectors, M = ceil(log2 E) binary choices a selector, C = 2^M codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Optional

import torch
from torch import Tensor

from moetrain.bounds import above, at_least
from moetrain.moe.assign import from_mask
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.smooth_choice import entropy_of_choices, smooth_step, valid_mean
from moetrain.ops.init import Normal, parameter
from moetrain.ops.linear import wide_linear

_THIRD = 3**-0.5  # a uniform draw of half-width h has the standard deviation h / sqrt(3)


@dataclass(frozen=True)
class DSelectKOptions(RouterConfig):
    name: str = "dselect_k"
    top_k: Optional[int] = None  # selectors, and so the experts of a token once they have chosen; null: 2
    gamma: float = field(default=1.0, metadata=above(0))  # width of the smooth step
    # in the penalty: of the selectors' entropy
    entropy_coef: float = field(default=0.05, metadata=at_least(0))
    # in the penalty, where E is no power of 2: of 1 / (a selector's mass on experts that exist)
    reach_coef: float = field(default=1.0, metadata=at_least(0))


@register(
    "dselect_k", DSelectKOptions, "Hazimeh et al. 2021, arXiv:2106.03760", "k experts a token, more at first"
)
class DSelectKRouter(Router):
    """Weights: the selectors' products of smooth steps, mixed by a softmax over selectors.

    They sum to 1 where E is a power of 2; else the mass of codes without an expert is missing. Experts of
    weight 0 are not computed. The penalty is a mean over tokens of both terms; the released code adds up the
    second one over the batch.
    """

    options: DSelectKOptions
    has_logits = False
    has_penalty = True

    def __init__(self, d_model: int, num_experts: int, options: DSelectKOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.selectors = resolve_top_k(options.top_k, num_experts)
        self.usual_rows_per_token = 2.0 * self.selectors
        self.bits = (num_experts - 1).bit_length()
        code_std, mix_std = options.gamma / 100 * _THIRD, 0.05 * _THIRD
        rows = self.selectors * self.bits
        self.mix_weight_KD = parameter((self.selectors, d_model), Normal(mix_std))
        self.mix_bias_K = parameter((self.selectors,), Normal(mix_std))
        # a single expert has no code
        self.code_weight_RD = parameter((rows, d_model), Normal(code_std)) if rows else None
        self.code_bias_R = parameter((rows,), Normal(code_std)) if rows else None

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        mix_TK = (wide_linear(x_TD, self.mix_weight_KD) + self.mix_bias_K).softmax(-1)
        choice_TKE = self.selection(x_TD, mix_TK)
        weights_TE = torch.einsum("tk,tke->te", mix_TK, choice_TKE)
        active_TE = weights_TE.detach() != 0  # NaN is taken: the loss is to tell of it
        routing = from_mask(active_TE, weights_TE, ctx, weights_TE)
        return replace(routing, penalty=self._penalty(choice_TKE, ctx))

    def selection(self, x_TD: Tensor, like_TK: Tensor) -> Tensor:
        """Each selector's weights [T, K, E], before they are mixed."""
        choice_TKC = torch.ones_like(like_TK)[..., None]
        if self.code_weight_RD is None or self.code_bias_R is None:
            return choice_TKC
        z_TR = wide_linear(x_TD, self.code_weight_RD) + self.code_bias_R
        s_TKM = smooth_step(z_TR, self.options.gamma).unflatten(-1, (self.selectors, self.bits))
        for s_TK1 in s_TKM.split(1, dim=-1):  # from the highest bit of an expert's number
            choice_TKC = torch.stack([choice_TKC * (1 - s_TK1), choice_TKC * s_TK1], -1).flatten(-2)
        return choice_TKC[..., : self.num_experts]

    def _penalty(self, choice_TKE: Tensor, ctx: RouterContext) -> Tensor:
        options = self.options
        penalty = options.entropy_coef * entropy_of_choices(choice_TKE, ctx)
        if self.num_experts != 2**self.bits:
            missing_T = (1 / (choice_TKE.sum(-1) + 1e-6)).sum(-1)
            penalty = penalty + options.reach_coef * valid_mean(missing_T, ctx)
        return penalty

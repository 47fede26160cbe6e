"""MoE++ (Jin et al. 2024, arXiv:2410.07348): top-k over feed-forward and zero-computation experts.

The router's logits also follow those of the layer before ("gating residual"). Zero-computation experts are
cheap, so they may take more: 1 / tau as much as a feed-forward expert.

Shapes: T tokens, D model, E experts of all kinds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.bounds import at_least, within
from moetrain.moe.assign import from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids
from moetrain.moe.zero_experts import ZeroKinds
from moetrain.ops.init import Constant, parameter

_EXPERTS = at_least(0, 2**24)


class MoEPPForm(Enum):
    """``paper``: weights are the softmax over all experts (eq. 6), and capacity counts tokens (eq. 8).

    ``released``: as the authors' layer (SkyworkAI/MoE-plus-plus). Zero experts weigh nothing and the rest of
    a token's weights sum to 1, and the input of every expert, of whatever kind, is multiplied by k. That
    layer has no capacity; one that is asked for counts assignments.
    """

    paper = "paper"
    released = "released"


@dataclass(frozen=True)
class MoEPPOptions(RouterConfig):
    name: str = "moepp"
    top_k: Optional[int] = None  # of all experts; null: 2
    num_zero: int = field(default=1, metadata=_EXPERTS)
    num_copy: int = field(default=1, metadata=_EXPERTS)
    num_constant: int = field(default=2, metadata=_EXPERTS)
    # share of tokens of a feed-forward expert, relative to a zero-computation one
    tau: float = field(default=0.75, metadata=within(0, 1, open_low=True))
    gating_residual: bool = True
    form: MoEPPForm = MoEPPForm.paper


@register(
    "moepp", MoEPPOptions, "Jin et al. 2024, arXiv:2410.07348", "k experts a token, some without a network"
)
class MoEPPRouter(LinearRouter):
    """k of the experts of all kinds, weighed by ``form``.

    With a capacity factor the experts' capacities are as 1 to tau, and together the factor times the tokens
    (``paper``) or the assignments (``released``). The first MoE layer has no layer before it: there the
    residual's matrix is unused. Raises ValueError for a negative number of experts, or tau outside (0, 1].
    """

    options: MoEPPOptions
    top_k: int
    reads_bias = True
    replays = True
    permutable = False  # experts of several kinds

    def __init__(self, d_model: int, num_experts: int, options: MoEPPOptions) -> None:
        kinds = ZeroKinds(options.num_zero, options.num_copy, options.num_constant)
        super().__init__(d_model, num_experts + kinds.total, options)
        self.top_k = resolve_top_k(options.top_k, self.num_experts)
        self.num_ffn_experts, self.zero_experts = num_experts, kinds
        self.released = options.form is MoEPPForm.released
        self.input_scale = float(self.top_k) if self.released else 1.0
        self.capacity_of_tokens = not self.released
        self.residual_EE = None
        if options.gating_residual:
            self.residual_EE = parameter((self.num_experts, self.num_experts), Constant(0.0))

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        if self.residual_EE is not None:
            logits_TE = logits_TE + self._residual(logits_TE, ctx)
        scores_TE = softmax(logits_TE)
        ids_TK = ctx.forced_TK
        if ids_TK is None:
            ids_TK = top_ids(scores_TE.detach() + self.bias_E, self.top_k)
        weights_TK = self._weights(scores_TE.gather(-1, ids_TK), ids_TK)
        routing = from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, scores_TE, logits_TE)
        price_E = torch.ones(self.num_experts, dtype=scores_TE.dtype, device=scores_TE.device)
        price_E[self.num_ffn_experts :] = self.options.tau
        assignment = replace(routing.assignment, num_ffn_experts=self.num_ffn_experts)
        return replace(routing, price_E=price_E, assignment=assignment)

    def _weights(self, scores_TK: Tensor, ids_TK: Tensor) -> Tensor:
        if not self.released:
            return scores_TK
        is_zero_TK = (ids_TK >= self.num_ffn_experts) & (
            ids_TK < self.num_ffn_experts + self.options.num_zero
        )
        weights_TK = scores_TK.masked_fill(is_zero_TK, 0.0)
        sum_T1 = weights_TK.sum(-1, keepdim=True)
        return weights_TK / torch.where(sum_T1 > 0, sum_T1, 1.0)  # zero experts alone: no output

    def _residual(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """The earlier layer's logits, mapped; where there is none, zeros that still reach the matrix."""
        before_TE = None if ctx.prev is None else ctx.prev.logits_TE
        if before_TE is None or before_TE.shape != logits_TE.shape:
            before_TE = torch.zeros_like(logits_TE)
        assert self.residual_EE is not None
        return F.linear(before_TE.to(logits_TE.dtype), self.residual_EE.to(logits_TE.dtype))

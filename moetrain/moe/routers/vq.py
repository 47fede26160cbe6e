"""VQMoE: a token also goes to the expert of its nearest code (Do et al. 2024, arXiv:2411.19402).

Shapes: T tokens, D model, E experts and as many codes, K top-k, L levels of a draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.bounds import at_least, within
from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import first_max, softmax, top_ids
from moetrain.ops.init import Constant, Initializer, Normal, Orthogonal, parameter
from moetrain.ops.linear import wide_linear
from moetrain.ops.local_part import set_row, whole

_SALT = 0x0C0DE
_LEVELS = 24  # the noise has 23 bits
_TEMPERATURE = 0.3  # of the scores that the balance loss reads


class Distance(Enum):
    """By which a code is the nearest: ``l2``, or the angle alone."""

    l2 = "l2"
    cosine = "cosine"


@dataclass(frozen=True)
class VQOptions(RouterConfig):
    name: str = "vq"
    top_k: Optional[int] = 1  # experts of the router proper, beside the one of the code
    distance: Distance = Distance.l2
    commitment: float = field(
        default=0.25, metadata=at_least(0)
    )  # of tokens to codes, against 1 the other way
    # of the codes' mean use, by which unused ones are set to tokens; null: they stay where they are
    usage_decay: Optional[float] = field(default=None, metadata=within(0, 1, open_high=True))

    def combine(self, num_experts: int) -> Combine:
        return Combine(total=1.0, drops=self.drops)


@register("vq", VQOptions, "Do et al. 2024, arXiv:2411.19402", "k experts a token, and its code's")
class VQRouter(LinearRouter):
    """Two choices, mixed by a softmax of two learnt numbers a token: the k best experts by x . w_e / |w_e|,
    with softmax weights of their own, and the expert of the nearest code, with weight 1. One that both
    choose gets both weights.

    The Routing's penalty is the mean over tokens and dimensions of (sg(x) - c)^2 + commitment (x - sg(c))^2,
    c the token's code and sg without gradient. With ``usage_decay`` d, u_e is the running mean of the share
    of tokens nearest to code e, and after a step the code of the least use becomes (1 - s) c + s x, with x a
    token of that step drawn evenly and s = exp(-10 E u / (1 - d) - 0.001), as in the released code, which
    does so for all codes at once. No draw yields a token in about one step of four; then no code moves.
    """

    options: VQOptions
    top_k: int
    reads_bias = True
    has_penalty = True
    usage_E: Tensor
    _fp32_buffers = ("bias_E", "usage_E")

    def __init__(self, d_model: int, num_experts: int, options: VQOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.gate_k = resolve_top_k(options.top_k, num_experts)
        self.top_k = min(self.gate_k + 1, num_experts)
        self.codes_ED = parameter((num_experts, d_model), Normal(3**-0.5 / num_experts))
        self.mix_2D = parameter((2, d_model), Normal((3 * d_model) ** -0.5))
        self.mix_bias_2 = parameter((2,), Constant(0.0))
        self.register_buffer("usage_E", torch.zeros(num_experts, dtype=torch.float32))

    @staticmethod
    def first_weights(d_model: int) -> Initializer:
        return Orthogonal(0.32)

    def logits(self, x_TD: Tensor) -> Tensor:
        weight_ED = self.weight_ED.to(torch.promote_types(x_TD.dtype, torch.float32))
        return wide_linear(x_TD, F.normalize(weight_ED, dim=-1, eps=1e-4))

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        dtype = logits_TE.dtype
        ids_TK = top_ids(logits_TE.detach() + self.bias_E, self.gate_k)
        mix_T2 = softmax(wide_linear(x_TD, self.mix_2D) + self.mix_bias_2.to(dtype))
        codes_ED = self.codes_ED.to(dtype)
        code_T = self._nearest(x_TD.detach(), codes_ED.detach())
        weights_TK = mix_T2[:, :1] * softmax(logits_TE.gather(-1, ids_TK))
        both_TK = ids_TK == code_T[:, None]
        weights_TK = torch.cat([weights_TK + both_TK * mix_T2[:, 1:], mix_T2[:, 1:]], 1)
        alone_T = code_T.masked_fill(both_TK.any(-1), self.num_experts)
        scores_TE = softmax(logits_TE / _TEMPERATURE)
        ids_TK = torch.cat([ids_TK, alone_T[:, None]], 1)
        routing = from_token_choice(
            ids_TK, weights_TK, ctx, self.num_experts, scores_TE, logits_TE, ragged=True
        )
        penalty = self._distances(x_TD, codes_ED, code_T, ctx)
        penalty = penalty / (self.d_model * routing.num_tokens.clamp(min=1))
        return replace(routing, penalty=penalty, stats=self._stats(x_TD, code_T, ctx))

    def _nearest(self, x_TD: Tensor, codes_ED: Tensor) -> Tensor:
        if self.options.distance is Distance.cosine:
            return first_max(wide_linear(x_TD, F.normalize(codes_ED, dim=-1)))
        return first_max(2 * wide_linear(x_TD, codes_ED) - codes_ED.square().sum(-1))

    def _distances(self, x_TD: Tensor, codes_ED: Tensor, code_T: Tensor, ctx: RouterContext) -> Tensor:
        """The penalty's sum over valid tokens and dimensions, from products of T x E and without T x D."""
        total = codes_ED.new_zeros(())
        for x, codes, factor in (
            (x_TD.detach(), codes_ED, 1.0),
            (x_TD, codes_ED.detach(), self.options.commitment),
        ):
            product_T = wide_linear(x, codes).gather(-1, code_T[:, None]).squeeze(-1)
            length_T = x.to(codes.dtype).norm(dim=-1).square()
            square_T = length_T - 2 * product_T + codes.square().sum(-1)[code_T]
            if ctx.valid_T is not None:
                square_T = square_T.where(ctx.valid_T, 0.0)
            total = total + factor * square_T.sum()
        return total

    @torch.no_grad()
    def _stats(self, x_TD: Tensor, code_T: Tensor, ctx: RouterContext) -> Tensor | None:
        """Tokens of each code [E]; then, for each level l, the tokens that drew less than 2^-l [L], and the
        sum of these [L D]. Where a level has one token on all ranks together, its sum is that token.
        """
        if not self.training or self.options.usage_decay is None:
            return None
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        drawn_T = ctx.uniform((x_TD.shape[0],), _SALT)
        level_L1 = 2.0 ** -torch.arange(_LEVELS, device=drawn_T.device, dtype=drawn_T.dtype)[:, None]
        low_LT = drawn_T < level_L1
        used_TE = F.one_hot(code_T, self.num_experts)
        if ctx.valid_T is not None:
            low_LT, used_TE = low_LT & ctx.valid_T, used_TE * ctx.valid_T[:, None]
            x_TD = x_TD.where(ctx.valid_T[:, None], 0.0)
        sum_LD = low_LT.to(dtype) @ x_TD.to(dtype)
        return torch.cat([used_TE.sum(0).double(), low_LT.sum(1).double(), sum_LD.double().view(-1)])

    @torch.no_grad()
    def after_step(self, stats: Tensor) -> None:
        """The codes' use follows the step's; the least used code moves towards a token of the step."""
        decay, num_experts = self.options.usage_decay, self.num_experts
        assert decay is not None
        stats = stats.to(self.usage_E.device)
        used_E, drawn_L, sum_X = stats.split([num_experts, _LEVELS, _LEVELS * self.d_model])
        if not bool(used_E.any()):
            return
        share_E = (used_E / used_E.sum()).to(self.usage_E.dtype)
        self.usage_E.mul_(decay).add_(share_E, alpha=1 - decay)
        one = (drawn_L == 1).nonzero()
        if not one.numel():
            return
        code = int(self.usage_E.argmin())
        strength = math.exp(-10 * num_experts * float(self.usage_E[code]) / (1 - decay) - 1e-3)
        token_D = sum_X.view(_LEVELS, self.d_model)[int(one[0])]
        before_D = whole(self.codes_ED)[code].double()
        set_row(self.codes_ED, code, (1 - strength) * before_D + strength * token_D)

"""S2MoE: tokens and noisy copies go through one MoE layer in training (Do et al. 2025, arXiv:2503.23007).

Written from the abstract and summaries of the paper; neither its body nor its authors' code was found.

Shapes: B batch, S sequence, T = B S tokens, D model, c tokens of each sequence at a time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetrain.models.feed_forward import layer_options, register_feed_forward
from moetrain.models.layers.common import context_of
from moetrain.models.options import ModelConfig
from moetrain.moe import MoELayer, RouterContext
from moetrain.moe.options import ExpertKind, ExpertsConfig, RouterConfig
from moetrain.moe.routing import Routing
from moetrain.moe.smooth_choice import valid_mean
from moetrain.ops.init import Constant, Normal, parameter
from moetrain.ops.linear import wide_linear
from moetrain.ops.low_rank import beside

_SALT = 0x52E0
_CHUNK_ELEMENTS = 2**21  # similarities at a time


class S2MoE(MoELayer):
    """y = g(x) M(x) + (1 - g(x)) M(x'), with g = sigmoid(w x + b); M(x) in evaluation, where x' is x.

    x' = (1 + s n) x + m + s n' element by element, with normal draws n and n', and the mean m and standard
    deviation s of the token's own elements. M is an MoELayer of any router. The Routing is that of x; its
    penalty has besides the router's own the contrast of x and x': the mean over tokens of the cross entropy
    of a softmax over the sequence's x', by cosines over ``temperature``, at the token's own.
    """

    takes_low_rank = ("w_mix_1D",)

    def __init__(self, temperature: float, **layer: Any) -> None:
        super().__init__(**layer)
        self.temperature = temperature
        width = self.router.d_model
        self.w_mix_1D = parameter((1, width), Normal(width**-0.5))
        self.b_mix_1 = parameter((1,), Constant(0.0))
        self.router.has_penalty = True

    def forward(
        self,
        x_BSD: Tensor,
        ctx: RouterContext | None = None,
        router_input: Tensor | None = None,
        shared_input: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        ctx = context_of(x_BSD, ctx)
        y_BSD, routing = super().forward(x_BSD, ctx, router_input, shared_input)
        penalty = routing.penalty
        if penalty is None:
            penalty = x_BSD.new_zeros((), dtype=torch.promote_types(x_BSD.dtype, torch.float32))
        if not self.training:
            return y_BSD, replace(routing, penalty=penalty)
        noisy_BSD = with_noise(x_BSD, ctx)
        noisy_y_BSD, _ = super().forward(noisy_BSD, ctx)
        logits_BS1, added = wide_linear(x_BSD, self.w_mix_1D), beside(self, "w_mix_1D")
        if added is not None:
            logits_BS1 = logits_BS1 + added(x_BSD)
        g_BS1 = (logits_BS1 + self.b_mix_1.to(logits_BS1.dtype)).sigmoid().to(y_BSD.dtype)
        contrast = valid_mean(contrast_T(x_BSD, noisy_BSD, ctx, self.temperature), ctx)
        return g_BS1 * y_BSD + (1 - g_BS1) * noisy_y_BSD, replace(routing, penalty=penalty + contrast)


def with_noise(x_BSD: Tensor, ctx: RouterContext) -> Tensor:
    """The noisy copy, in the dtype of x."""
    batch, seq, width = x_BSD.shape
    wide_BSD = x_BSD.to(torch.promote_types(x_BSD.dtype, torch.float32))
    mean_BS1 = wide_BSD.mean(-1, keepdim=True)
    deviation_BS1 = torch.linalg.vector_norm(wide_BSD - mean_BS1, dim=-1, keepdim=True) / math.sqrt(width)
    draws = ctx.uniform((batch * seq, 2 * width), _SALT).to(wide_BSD.dtype).view(batch, seq, 2 * width)
    scaling_BSD, shift_BSD = (math.sqrt(2) * torch.erfinv(2 * draws - 1)).chunk(2, -1)
    noisy_BSD: Tensor = (1 + deviation_BS1 * scaling_BSD) * wide_BSD + mean_BS1 + deviation_BS1 * shift_BSD
    return noisy_BSD.to(x_BSD.dtype)


def contrast_T(x_BSD: Tensor, noisy_BSD: Tensor, ctx: RouterContext, temperature: float) -> Tensor:
    """[T]: each token's cross entropy among the noisy copies of its sequence. Padding is none of them.

    By some tokens of each sequence at a time, computed again in the backward pass.
    """
    wide = torch.promote_types(x_BSD.dtype, torch.float32)
    one_BSD, other_BSD = (F.normalize(x.to(wide), dim=-1) for x in (x_BSD, noisy_BSD))
    valid_B1S = None if ctx.valid_T is None else ctx.valid_T.view(ctx.batch, 1, ctx.seq)
    rows = max(1, _CHUNK_ELEMENTS // max(1, ctx.batch * ctx.seq))
    parts = [
        checkpoint(
            _contrast, one_BSD[:, at : at + rows], other_BSD, valid_B1S, at, temperature,
            use_reentrant=False, preserve_rng_state=False,
        )
        for at in range(0, ctx.seq, rows)
    ]  # fmt: skip
    return torch.cat([one_BSD.new_zeros(ctx.batch, 0), *parts], 1).reshape(-1)


def _contrast(
    one_BcD: Tensor, other_BSD: Tensor, valid_B1S: Tensor | None, first: int, temperature: float
) -> Tensor:
    logits_BcS = one_BcD @ other_BSD.mT / temperature
    if valid_B1S is not None:
        logits_BcS = logits_BcS.masked_fill(~valid_B1S, torch.finfo(logits_BcS.dtype).min)
    own_Bc = logits_BcS.diagonal(first, 1, 2)
    return logits_BcS.logsumexp(-1) - own_Bc


@register_feed_forward("s2moe", on_meta=True, alike=True)
def _s2moe(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
    if experts.kind is not ExpertKind.networks:
        raise ValueError(f"experts.kind={experts.kind.name}: leave it at experts.kind=networks")
    if cfg.expert_widths:
        raise ValueError("its experts have one width: leave model.expert_widths out")
    common = layer_options(cfg, router, experts, layer)
    made = {"d_ff": cfg.d_ff_expert, "first_weights": experts.first_weights}
    return S2MoE(cfg.s2moe.temperature, **made, **common)

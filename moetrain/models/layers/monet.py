"""Monet: n^2 experts made of 2 n parts, computed without forming any (Park et al. 2024, arXiv:2412.04139).

horizontal  expert (i, j) of x: V_j act(U_i x + a_i) + b_j
vertical    its left half V11_i h1_i + V12_i h2_j + b1_i and right half V21_j h1_i + V22_j h2_j + b2_j,
            with h1_i = act(U1_i x + a1_i) and h2_j likewise: half of the hidden units each

and y = sum over heads, i and j of g1_i g2_j expert_ij(x). Sums over heads and one side are done first, so
that a token costs what the 2 n parts cost and not the n^2 experts. The first of ``share`` consecutive MoE
layers has the router; those after it read its gates, so a gate's gradient is a sum over layers.

Shapes: B batch, S sequence, T = B S tokens, D model (L left, R right), H heads, n parts of a side, M hidden
units of an expert (p and q: of the two sides).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.models.feed_forward import WithoutDispatch, register_feed_forward
from moetrain.models.layer_options import Decomposition, MonetConfig
from moetrain.models.layers.common import context_of, plain_activation, refuse_unread
from moetrain.models.options import ModelConfig, is_moe_layer
from moetrain.moe import RouterContext, RoutingRecord
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.moe.pair_router import PairRecord, PairRouter
from moetrain.ops.activations import activate
from moetrain.ops.init import Constant, Normal, parameter
from moetrain.ops.uses import Use


class Horizontal(nn.Module):
    """``forward(x [T, D], g1 [T, H, n], g2)``."""

    keeps_own_init = True

    def __init__(self, d_model: int, n: int, width: int, activation: str, std: float) -> None:
        super().__init__()
        self.n, self.activation = n, activation
        self.w_up = parameter((n * width, d_model), Normal(std))
        self.b_up = parameter((n * width,), Constant(0.0))
        self.w_down = parameter((d_model, n * width), Normal(std))
        self.bias_nD = parameter((n, d_model), Constant(0.0))

    def forward(self, x_TD: Tensor, g1_THn: Tensor, g2_THn: Tensor) -> Tensor:
        hidden_TnM = _hidden(x_TD, self.w_up, self.b_up, self.n, self.activation)
        mixed_TnM = _crossed(hidden_TnM, g1_THn, g2_THn)
        y_TD: Tensor = F.linear(mixed_TnM.flatten(1), self.w_down) + g2_THn.sum(1) @ self.bias_nD
        return y_TD


class Vertical(nn.Module):
    """Likewise; of an odd number of units or outputs the first side has one more."""

    keeps_own_init = True

    def __init__(self, d_model: int, n: int, width: int, activation: str, std: float) -> None:
        super().__init__()
        self.n, self.activation = n, activation
        first, second = n * (width - width // 2), n * (width // 2)
        left, right = d_model - d_model // 2, d_model // 2
        self.w_up_1 = parameter((first, d_model), Normal(std))
        self.w_up_2 = parameter((second, d_model), Normal(std))
        self.b_up_1 = parameter((first,), Constant(0.0))
        self.b_up_2 = parameter((second,), Constant(0.0))
        self.w_down_11 = parameter((left, first), Normal(std))
        self.w_down_12 = parameter((left, second), Normal(std))
        self.w_down_21 = parameter((right, first), Normal(std))
        self.w_down_22 = parameter((right, second), Normal(std))
        self.bias_nL = parameter((n, left), Constant(0.0))
        self.bias_nR = parameter((n, right), Constant(0.0))

    def forward(self, x_TD: Tensor, g1_THn: Tensor, g2_THn: Tensor) -> Tensor:
        first_Tnp = _hidden(x_TD, self.w_up_1, self.b_up_1, self.n, self.activation)
        second_Tnq = _hidden(x_TD, self.w_up_2, self.b_up_2, self.n, self.activation)
        g1_Tn, g2_Tn = g1_THn.sum(1), g2_THn.sum(1)
        left_TL = (
            F.linear((first_Tnp * g1_Tn[..., None]).flatten(1), self.w_down_11)
            + F.linear(_crossed(second_Tnq, g2_THn, g1_THn).flatten(1), self.w_down_12)
            + g1_Tn @ self.bias_nL
        )
        right_TR = (
            F.linear(_crossed(first_Tnp, g1_THn, g2_THn).flatten(1), self.w_down_21)
            + F.linear((second_Tnq * g2_Tn[..., None]).flatten(1), self.w_down_22)
            + g2_Tn @ self.bias_nR
        )
        return torch.cat([left_TL, right_TR], 1)


def _hidden(x_TD: Tensor, w_up: Tensor, b_up: Tensor, n: int, activation: str) -> Tensor:
    z = F.linear(x_TD, w_up, b_up)
    hidden_TnM: Tensor = activate(None, z, activation).unflatten(1, (n, len(w_up) // n))
    return hidden_TnM


def _crossed(hidden_TnM: Tensor, from_THn: Tensor, to_THn: Tensor) -> Tensor:
    """[T, n, M]: part j gets the sum over heads of to_j times the head's mixture of parts by ``from``."""
    return torch.bmm(to_THn.transpose(1, 2), torch.bmm(from_THn, hidden_TnM))


class Monet(WithoutDispatch):
    """``has_router``: whether it is the first of the layers that share one.

    Raises ValueError where ``num_experts`` is no square, or for less than two units of a vertical expert.
    """

    def __init__(
        self,
        d_model: int,
        width: int,
        num_experts: int,
        options: MonetConfig,
        activation: str,
        std: float,
        has_router: bool,
    ) -> None:
        super().__init__()
        n = math.isqrt(num_experts)
        if n * n != num_experts:
            raise ValueError(
                f"model.num_experts={num_experts} must be a square, the pairs of n and n parts: "
                f"take {n * n} or {(n + 1) ** 2}"
            )
        vertical = options.decompose is Decomposition.vertical
        if vertical and width < 2:
            raise ValueError(
                f"model.d_ff_expert={width} has no halves: set 2 or more, or decompose=horizontal"
            )
        self.heads = options.heads
        self.router = (
            PairRouter(d_model, n, options.heads, options.top_k, options.norm_momentum)
            if has_router
            else None
        )
        kind = Vertical if vertical else Horizontal
        self.experts = kind(d_model, n, width, activation, std)
        # crossing over takes two multiply-adds a head for each hidden unit: by the rows of what reads them
        self.uses = {
            f"experts.{name}": Use(1.0, 1 + 2 * options.heads / len(parameter))
            for name, parameter in self.experts.named_parameters()
            if name in ("w_down", "w_down_12", "w_down_21")
        }

    def forward(self, x_BSD: Tensor, ctx: RouterContext | None = None) -> tuple[Tensor, RoutingRecord | None]:
        """A layer without a router reads the gates of ``ctx.prev``, and has nothing to tell."""
        ctx = context_of(x_BSD, ctx)
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        record = ctx.prev if self.router is None else self.router(x_TD, ctx)
        if not isinstance(record, PairRecord):
            raise ValueError(
                "a Monet layer without a router needs the record of the one before it, in ctx.prev"
            )
        shape = (2, self.heads, self.experts.n)
        g1_THn, g2_THn = record.gates_TE.to(x_TD.dtype).unflatten(1, shape).unbind(1)
        y_BSD = self.experts(x_TD, g1_THn, g2_THn).view_as(x_BSD)
        return y_BSD, None if self.router is None else record


@register_feed_forward("monet", on_meta=True)
def _monet(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
    refuse_unread(cfg, experts)
    before = sum(is_moe_layer(cfg, place) for place in range(layer))
    return Monet(
        cfg.d_model,
        cfg.d_ff_expert,
        cfg.num_experts,
        cfg.monet,
        plain_activation(experts),
        cfg.init_std,
        before % cfg.monet.share == 0,
    )

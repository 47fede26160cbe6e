"""HyperRouter: a fixed network makes the router out of a trained vector (Do et al. 2023, arXiv:2312.07035).

Shapes: T tokens, D model, E experts, K top-k, H hidden width of the network, G = E (D + 1) numbers it makes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.bounds import at_least
from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import softmax, top_ids
from moetrain.ops.init import Normal, parameter


@dataclass(frozen=True)
class HyperOptions(RouterConfig):
    name: str = "hyper"
    top_k: Optional[int] = None
    hidden: int = field(default=256, metadata=at_least(1, 2**24))  # width of the fixed network

    def combine(self, num_experts: int) -> Combine:
        k = resolve_top_k(self.top_k, num_experts)
        return Combine(top_k=k, even_weight=1 / k, total=1.0, drops=self.drops)


@register("hyper", HyperOptions, "Do et al. 2023, arXiv:2312.07035", "k experts a token")
class HyperRouter(Router):
    """W, b = network(e), logits = W x + b, weights are the softmax over the k best logits.

    ``embedding_1D``, e, is all that is trained. The network (linear, ReLU, linear) keeps its first weights:
    they are parameters without a gradient, so that a checkpoint holds them and no optimizer moves them. They
    have the variances of torch's ``nn.Linear``, which the released code draws uniformly.
    """

    top_k: int
    reads_bias = True

    def __init__(self, d_model: int, num_experts: int, options: HyperOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)
        made, hidden = num_experts * (d_model + 1), options.hidden
        self.embedding_1D = parameter((1, d_model), Normal(1.0))
        self.hidden_HD = _fixed((hidden, d_model), d_model)
        self.hidden_bias_H = _fixed((hidden,), d_model)
        self.made_GH = _fixed((made, hidden), hidden)
        self.made_bias_G = _fixed((made,), hidden)

    def products_per_token(self) -> int:
        return self.num_experts * self.d_model  # the network is run once for all tokens

    def made(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The router's weight [E, D] and its bias [E]."""
        layers = [(self.hidden_HD, self.hidden_bias_H), (self.made_GH, self.made_bias_G)]
        (first, second) = [(weight.to(dtype), bias.to(dtype)) for weight, bias in layers]
        made_1G = F.linear(F.linear(self.embedding_1D.to(dtype), *first).relu(), *second)
        made_EJ = made_1G.view(self.num_experts, self.d_model + 1)
        return made_EJ[:, :-1], made_EJ[:, -1]

    def logits(self, x_TD: Tensor) -> Tensor:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(dtype), *self.made(dtype))

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        ids_TK = top_ids(logits_TE.detach() + self.bias_E, self.top_k)
        weights_TK = softmax(logits_TE.gather(-1, ids_TK))
        return from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, softmax(logits_TE), logits_TE)


def _fixed(shape: tuple[int, ...], inputs: int) -> nn.Parameter:
    made = parameter(shape, Normal((3 * inputs) ** -0.5))
    made.requires_grad_(False)
    return made

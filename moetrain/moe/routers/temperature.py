"""Softmax with a temperature and an activation before it, then top-k (Nguyen et al. 2024, arXiv:2401.13875).

The paper, of which the abstract was read, finds that a dense-to-sparse gate learns its parameters slowly
because the temperature and the linear map can stand for one another, and that an activation of the linear
map's output, before the temperature, mends it. Its gate weighs all experts; here the best k are taken.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.bounds import above, at_least
from moetrain.kernels.router.rule import Rule
from moetrain.moe.anneal import Decay, annealed
from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.token_choice import choose_experts


class GateActivation(Enum):
    """Of the linear map's output; ``identity``: none."""

    identity = "identity"
    sigmoid = "sigmoid"
    tanh = "tanh"
    gelu = "gelu"


_ACTIVATIONS: dict[GateActivation, Callable[[Tensor], Tensor]] = {
    GateActivation.identity: lambda x: x,
    GateActivation.sigmoid: torch.sigmoid,
    GateActivation.tanh: torch.tanh,
    GateActivation.gelu: F.gelu,
}


@dataclass(frozen=True)
class TemperatureOptions(RouterConfig):
    name: str = "temperature"
    top_k: Optional[int] = None  # null: 2, or 1 where there is one expert
    activation: GateActivation = GateActivation.sigmoid
    tau_start: float = field(default=2.0, metadata=above(0))
    tau_end: float = field(default=0.3, metadata=above(0))
    tau_steps: int = field(default=1000, metadata=at_least(0))  # from one to the other
    decay: Decay = Decay.exponential
    renormalize: bool = True  # chosen weights sum to 1

    def combine(self, num_experts: int) -> Combine:
        k = resolve_top_k(self.top_k, num_experts)
        return Combine.of_softmax(k, num_experts, self.drops, self.renormalize)


@register("temperature", TemperatureOptions, "Nguyen et al. 2024, arXiv:2401.13875", "k experts a token")
class TemperatureRouter(LinearRouter):
    """Scores softmax(a(W x) / tau), of which the k best are taken; logits are W x.

    With the activation ``identity`` and tau 1 it is ``topk``. Evaluation has the temperature of the end.
    """

    options: TemperatureOptions
    top_k: int
    reads_bias = True

    def __init__(self, d_model: int, num_experts: int, options: TemperatureOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.top_k = resolve_top_k(options.top_k, num_experts)
        self.rule = Rule(self.top_k, "softmax", options.renormalize, 1.0, 1, 1, "top2")

    def tau(self, step: int) -> float:
        """The temperature of a training step."""
        o = self.options
        return annealed(o.tau_start, o.tau_end, o.tau_steps, step, o.decay)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        tau = self.tau(ctx.step) if self.training else self.options.tau_end
        exponent_TE = _ACTIVATIONS[self.options.activation](logits_TE) / tau
        chosen = choose_experts(exponent_TE, self.bias_E, self.rule, self.backend)
        return from_token_choice(
            chosen.ids_TK, chosen.weights_TK, ctx, self.num_experts, chosen.scores_TE, logits_TE
        )

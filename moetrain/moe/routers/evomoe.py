"""EvoMoE's dense-to-sparse gate: a Gumbel softmax whose temperature falls (Nie et al. 2021,
arXiv:2112.14397).

A token takes every expert whose noisy probability passes a threshold: all of them while the temperature is
high, one in the end. Evaluation takes the best expert. Follows ``topkgate.py`` of the authors' code
(codecaution/EvoMoE) and the schedule of its ``train.py``. That code has no spawning of experts from one;
``moetrain upcycle method=diversify`` does it.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

from moetrain.bounds import above, at_least, within
from moetrain.moe.anneal import Decay, annealed
from moetrain.moe.assign import from_mask
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register
from moetrain.moe.routing import Routing
from moetrain.moe.topk_ops import first_max, softmax

_SALT = 0xE40


@dataclass(frozen=True)
class EvoMoEOptions(RouterConfig):
    name: str = "evomoe"
    tau_start: float = field(default=2.0, metadata=above(0))
    tau_end: float = field(default=0.3, metadata=above(0))
    tau_steps: int = field(default=1000, metadata=at_least(0))  # from one to the other
    decay: Decay = Decay.exponential
    # a token takes the experts of a higher noisy probability; below 1 / experts, so that there is one
    threshold: float = field(default=0.001, metadata=within(0, 1, open_high=True))
    hard_step: Optional[int] = field(
        default=None, metadata=at_least(0)
    )  # from it on the best alone; null: never
    gumbel_weights: bool = True  # weights are the noisy probabilities; else the plain softmax's


@register(
    "evomoe", EvoMoEOptions, "Nie et al. 2021, arXiv:2112.14397", "all experts at first, one in the end"
)
class EvoMoERouter(LinearRouter):
    """p = softmax((z + Gumbel noise) / tau); experts of p above the threshold; p, as it is, is the weight.

    Scores are the weights, 0 for an expert that is not taken: the loss ``l1``, with that, is the released
    code's balance loss. In evaluation there is no noise, and tau is what it ends with. Raises ValueError
    where the threshold is not below 1 / E.
    """

    options: EvoMoEOptions

    def __init__(self, d_model: int, num_experts: int, options: EvoMoEOptions) -> None:
        super().__init__(d_model, num_experts, options)
        if num_experts > 1 and options.threshold >= 1 / num_experts:
            raise ValueError(
                f"router.threshold={options.threshold:g} must be below 1 / num_experts={1 / num_experts:g}, "
                "or a token may take no expert: lower it"
            )
        self.usual_rows_per_token = 2.0

    def tau(self, step: int) -> float:
        """The temperature of a training step."""
        o = self.options
        return annealed(o.tau_start, o.tau_end, o.tau_steps, step, o.decay)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        options = self.options
        gates_TE = self._gates(logits_TE, ctx)
        hard = not self.training or (options.hard_step is not None and ctx.step >= options.hard_step)
        if hard:
            best_T1 = first_max(gates_TE.detach())[:, None]
            taken_TE = torch.zeros_like(gates_TE, dtype=torch.bool).scatter(1, best_T1, True)
        else:
            taken_TE = ~(gates_TE.detach() <= options.threshold)  # NaN is taken: the loss is to tell of it
        weights_TE = gates_TE if options.gumbel_weights else softmax(logits_TE)
        weights_TE = weights_TE * taken_TE
        return from_mask(taken_TE, weights_TE, ctx, weights_TE, logits_TE)

    def _gates(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        if not self.training:
            return softmax(logits_TE / self.options.tau_end)
        noise_TE = ctx.uniform(tuple(logits_TE.shape), _SALT).to(logits_TE.dtype)
        return softmax((logits_TE - torch.log(-torch.log(noise_TE))) / self.tau(ctx.step))

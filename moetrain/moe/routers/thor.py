"""THOR: experts by chance, one a layer and pass (Zuo et al. 2022, arXiv:2110.04260).

Its training is two passes a step whose predictions are held together: ``train.task=thor``
(``train/consistency.py``).

Shapes: T tokens, B sequences of S, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor

from moetrain.bounds import at_least
from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router, register
from moetrain.moe.routing import Routing

_SALT = 0x7403


class Level(Enum):
    """What is sent to an expert as one: all tokens of a ``step``, on whatever ranks, a ``sequence``, a
    ``token``."""

    step = "step"
    sequence = "sequence"
    token = "token"


@dataclass(frozen=True)
class ThorOptions(RouterConfig):
    name: str = "thor"
    level: Level = Level.step  # in training
    eval_level: Level = Level.token
    # of the distance between the predictions of two passes, in the loss of train.task=thor
    consistency: float = field(default=1.0, metadata=at_least(0))

    def combine(self, num_experts: int) -> Combine:
        return Combine(top_k=1, even_weight=1.0, total=1.0, drops=self.drops)


@register("thor", ThorOptions, "Zuo et al. 2022, arXiv:2110.04260", "one expert a token, by chance")
class ThorRouter(Router):
    """Each expert with the same probability, weight 1. No parameters, no scores.

    Draws follow the seed, so that a pass of another seed draws anew; in generation a token draws as it does
    in a whole text.
    """

    options: ThorOptions
    top_k = 1
    has_scores = has_logits = False
    task = "thor"

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        noise_T = self._noise(ctx, self.options.level if self.training else self.options.eval_level)
        ids_T = (noise_T * self.num_experts).long()  # noise is below 1, and no product rounds up to E
        weights_T1 = x_TD.new_ones(len(ids_T), 1, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        return from_token_choice(ids_T[:, None], weights_T1, ctx, self.num_experts)

    def _noise(self, ctx: RouterContext, level: Level) -> Tensor:
        """[T], uniform, the same for what goes to one expert."""
        tokens = ctx.batch * ctx.seq
        if level is Level.step:
            return ctx.common_uniform(1, ctx.step, _SALT).expand(tokens)
        whole = replace(ctx, seq=ctx.seen + ctx.seq)  # with what generation saw in earlier calls
        noise_BS = whole.uniform((ctx.batch * whole.seq,), _SALT).view(ctx.batch, whole.seq)
        if level is Level.sequence:
            return noise_BS[:, :1].expand(ctx.batch, ctx.seq).reshape(tokens)
        return noise_BS[:, ctx.seen :].reshape(tokens)

"""Sparsity-constrained transport: experts of one mass, each with at most k tokens (Liu et al. 2023,
arXiv:2209.15466).

Training selects by the plan of each routing group, evaluation by the logits. Not causal in training. Written
from the paper's problem as PythonOT's ``ot/smooth.py`` restates it; how the authors' router weighs and
evaluates was not read: weights are softmax scores here, as the other balanced plans' are.

Shapes: T tokens, E experts, G groups of L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from torch import Tensor

from moetrain.bounds import above, at_least, within
from moetrain.moe.assign import from_mask, from_token_choice
from moetrain.moe.context import RouterContext
from moetrain.moe.groups import by_group
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import LinearRouter, register, resolve_top_k
from moetrain.moe.routing import Routing
from moetrain.moe.solvers import sparse_plan
from moetrain.moe.topk_ops import softmax, top_ids

_LEAST = 1e-6  # of a token's mass: a smaller part of the plan is rounding
# What a score is rounded to: another layout's products differ in their last bits, and a search that has not
# ended would make tokens of them.
_GRID = 2.0**-20


@dataclass(frozen=True)
class ScotOptions(RouterConfig):
    name: str = "scot"
    # an expert takes at most so many times a group's tokens / experts; experts a token in evaluation; null: 2
    top_k: Optional[int] = None
    # of half the plan's square, where a token has the mass 1: more makes it spread
    gamma: float = field(default=0.5, metadata=above(0))
    iterations: int = field(default=60, metadata=at_least(1))
    # of a token's mass: where the plan is near enough
    tolerance: float = field(default=1.0e-3, metadata=within(0, 1, open_low=True, open_high=True))


@register(
    "scot", ScotOptions, "Liu et al. 2023, arXiv:2209.15466", "any number a token, at most so many an expert"
)
class ScotRouter(LinearRouter):
    """A token takes the experts that the plan gives it a part of, ceil(L k / E) tokens an expert at most.

    Every token has the same mass in the plan, and so at least one expert, but where the bound on an expert's
    tokens binds so hard that no potentials reach it. Weights are softmax scores; the plan has no gradient.
    """

    options: ScotOptions
    causal = False

    def __init__(self, d_model: int, num_experts: int, options: ScotOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.share_k = resolve_top_k(options.top_k, num_experts)

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = softmax(logits_TE)
        if self.training:
            return from_mask(self._chosen(logits_TE.detach(), ctx), scores_TE, ctx, scores_TE, logits_TE)
        ids_TK = top_ids(logits_TE.detach(), self.share_k)
        weights_TK = scores_TE.gather(-1, ids_TK)
        return from_token_choice(ids_TK, weights_TK, ctx, self.num_experts, scores_TE, logits_TE)

    def _chosen(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        options = self.options
        groups = by_group(logits_TE, ctx, options.group)
        broken_GL1 = ~groups.values_GLC.isfinite().all(-1, keepdim=True)  # every expert takes it: it shows
        valid_GL = groups.valid_GL & ~broken_GL1.squeeze(-1)
        most_G = -(-valid_GL.sum(-1) * self.share_k // self.num_experts)
        most = -(-valid_GL.shape[1] * self.share_k // self.num_experts)
        scores_GLE = groups.values_GLC.double().masked_fill(broken_GL1, 0.0)
        scores_GLE = (scores_GLE / _GRID).round() * _GRID
        plan_GLE = sparse_plan(
            scores_GLE, valid_GL, most_G, most, options.gamma, options.iterations, options.tolerance
        )
        return groups.own((plan_GLE > _LEAST) | broken_GL1)

"""What function preservation needs to know of a router: how it weighs the experts that it chose for a token.

Shapes: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from moetrain.moe import ROUTERS
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import resolve_top_k
from moetrain.moe.routers.hashed import HashOptions
from moetrain.moe.routers.noisy_topk import NoisyTopKOptions
from moetrain.moe.routers.random import RandomOptions
from moetrain.moe.routers.sigma import SigmaOptions
from moetrain.moe.routers.topk import Score, TopKOptions


@dataclass(frozen=True)
class Combine:
    """A router's weights, before any training.

    top_k        experts of each token; None where that is not a fixed number, or not known.
    even_weight  the weight of each of them where all experts score alike; None where it is not known.
    total        the sum of a token's weights where it is the same for all tokens, else None.
    ties_whole   whether experts of equal score are chosen by index, so that neighbours go together.
    drops        whether a capacity may take assignments away.
    own_scores   whether an expert's score is its own (sigmoid), not a share of one (softmax).
    num_groups   groups of experts that selection is limited to; 1 where there is no limit.
    """

    top_k: int | None
    even_weight: float | None
    total: float | None
    ties_whole: bool
    drops: bool
    own_scores: bool = False
    num_groups: int = 1

    def keeps_the_total(self) -> str | None:
        """None where every token's weights sum to ``total`` and arrive; else the reason why not."""
        if self.total is None:
            return "this router's weights do not sum to the same number for every token"
        return CAPACITY if self.drops else None


CAPACITY = "a capacity may drop assignments; set router.capacity_factor=null"


def full_options(router: RouterConfig) -> RouterConfig:
    """The router's own options, also where only what all routers share was given."""
    if type(router) is not RouterConfig:
        return router
    shared = {f.name: getattr(router, f.name) for f in fields(router)}
    return ROUTERS[router.name].options(**shared)


def combine_of(router: RouterConfig, num_experts: int) -> Combine:
    """The facts of ``router`` over E experts."""
    options = full_options(router)
    drops = options.capacity_factor is not None or options.eval_capacity_factor is not None
    if isinstance(options, TopKOptions):
        return _top_k(options, num_experts, drops)
    if isinstance(options, (HashOptions, RandomOptions, NoisyTopKOptions)):  # weights sum to 1, by chance
        k = resolve_top_k(options.top_k, num_experts)
        return Combine(k, 1 / k, 1.0, False, drops)
    return Combine(None, None, None, False, drops, isinstance(options, SigmaOptions))


def _top_k(options: TopKOptions, num_experts: int, drops: bool) -> Combine:
    k, scale = resolve_top_k(options.top_k, num_experts), options.route_scale
    limited = options.top_groups not in (None, options.num_groups)
    own_scores = options.score is Score.sigmoid
    facts = Combine(k, None, None, True, drops, own_scores, options.num_groups if limited else 1)
    if options.renormalize or options.score is Score.softmax_after:
        return replace(facts, even_weight=scale / k, total=scale)
    if own_scores:
        return replace(facts, even_weight=scale / 2)
    return replace(facts, even_weight=scale / num_experts, total=scale if k == num_experts else None)

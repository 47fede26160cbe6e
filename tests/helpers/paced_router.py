"""A plug-in router for tests: the default's, at a pace. Loaded by ``plugins=[paced_router]``. T tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from moetrain.moe import RouterContext, Routing
from moetrain.moe.routers import register
from moetrain.moe.routers.topk import Score, TopKOptions, TopKRouter


@dataclass(frozen=True)
class PacedOptions(TopKOptions):
    """``seconds``: of rest in each training step, which change nothing else."""

    name: str = "paced"
    score: Score = Score.sigmoid  # this and the next two as in the default, router=topk_sigmoid
    renormalize: bool = False
    route_scale: float = 2.0
    seconds: float = 0.0


@register("paced", PacedOptions)
class PacedRouter(TopKRouter):
    options: PacedOptions

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        if self.training and ctx.layer == 0:
            time.sleep(self.options.seconds)
        return super().route(x_TD, ctx)

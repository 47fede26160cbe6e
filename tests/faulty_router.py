"""A plug-in router for tests: top-k, with faults on order. Loaded by ``plugins=[faulty_router]``.

T tokens, E experts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moetrain.moe import RouterContext, Routing
from moetrain.moe.routers import register
from moetrain.moe.routers.topk import TopKOptions, TopKRouter


@dataclass(frozen=True)
class FaultyOptions(TopKOptions):
    """``sample`` of the run's order gives NaN or weights ``scale`` times too large, in training only."""

    name: str = "faulty"
    samples: list[int] = field(default_factory=list)
    fault: str = "nan"  # nan | scale
    signal: int = 0  # sent once to this process in the step (from 0) called at_step, by the rank called rank
    at_step: int = -1
    rank: int = 0


@register("faulty", FaultyOptions)
class FaultyRouter(TopKRouter):
    options: FaultyOptions

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        options = self.options
        routing = super().route(x_TD, ctx)
        if not self.training:
            return routing
        mine = options.signal and options.rank == int(os.environ.get("RANK", "0"))
        if mine and (ctx.step, ctx.layer) == (options.at_step, 0) and not getattr(self, "_sent", False):
            self._sent = True
            os.kill(os.getpid(), options.signal)
        if bool(torch.isin(ctx.sample_ids_B, torch.tensor(options.samples)).any()):
            factor = float("nan") if options.fault == "nan" else float(os.environ.get("FF","1e3"))
            return replace(routing, weights_N=routing.weights_N * factor)
        return routing

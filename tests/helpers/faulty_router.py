"""A plug-in router for tests: top-k, with faults on order. Loaded by ``plugins=[faulty_router]``.

T tokens, E experts.
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moetrain.moe import RouterContext, Routing
from moetrain.moe.routers import register
from moetrain.moe.routers.topk import Score, TopKOptions, TopKRouter


@dataclass(frozen=True)
class FaultyOptions(TopKOptions):
    """In training, a micro-batch with one of ``samples`` of the run's order has a ``fault``.

    nan: weights of NaN; scale: weights a thousand times too large, and negative; sleep: it takes a minute.
    """

    name: str = "faulty"
    score: Score = Score.sigmoid  # this and the next two as in the default, router=topk_sigmoid
    renormalize: bool = False
    route_scale: float = 2.0
    samples: list[int] = field(default_factory=list)
    fault: str = "nan"
    pace: float = 0.0  # seconds of rest in each training step, which change nothing else
    # Once, in the step (from 0) called at_step, in the MoE layer called at_layer, by the rank called rank:
    signal: int = 0  # sent to this process
    sleep: float = 0.0  # seconds
    hold: bool = False  # sleep without letting another thread run Python
    at_step: int = -1
    at_layer: int = 0
    rank: int = 0


@register("faulty", FaultyOptions)
class FaultyRouter(TopKRouter):
    options: FaultyOptions

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        options = self.options
        routing = super().route(x_TD, ctx)
        if not self.training:
            return routing
        if ctx.layer == 0:
            time.sleep(options.pace)
        mine = options.rank == int(os.environ.get("RANK", "0"))
        now = (ctx.step, ctx.layer) == (options.at_step, options.at_layer)
        if mine and now and not getattr(self, "_done", False):
            self._done = True
            self._once()
        if bool(torch.isin(ctx.sample_ids_B, torch.tensor(options.samples)).any()):
            if options.fault == "sleep":
                time.sleep(60)
            factor = float("nan") if options.fault == "nan" else -1e3
            weights_N = routing.assignment.weights_N * factor
            return replace(routing, assignment=replace(routing.assignment, weights_N=weights_N))
        return routing

    def _once(self) -> None:
        if self.options.signal:
            os.kill(os.getpid(), self.options.signal)
        if self.options.hold:
            ctypes.PyDLL(None).usleep(int(self.options.sleep * 1e6))
        else:
            time.sleep(self.options.sleep)

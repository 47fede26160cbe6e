"""One network's hidden units dealt out to experts: at random, by what is active together or by importance.

MoEfication (Zhang et al. 2022, arXiv:2110.01786) finds units that fire together; LLaMA-MoE (Zhu et al. 2024,
arXiv:2406.16554) splits and trains on; LLaMA-MoE v2 (Qu et al. 2024, arXiv:2411.15708) deals units to the
experts whose tokens' loss depends on them. Experts hold d_ff_expert units each and no unit twice, so that
all of them at weight 1, plus the shared expert, are the dense network.

Routing weights are not 1: with w the weight of a chosen expert where all score alike, the down projections
are multiplied by E / (k w). That keeps the mean over even choices, and with k = E and an even router
(``router_start=zeros``) it is exact. Where weights are renormalised it is E, whatever k.

Shapes: E experts, F units of an expert, Q of the shared expert, N of the dense network, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Optional

import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.moe.combine import CAPACITY
from moetrain.upcycle.calibration import LayerCalibration, need
from moetrain.upcycle.cluster import balanced_kmeans
from moetrain.upcycle.draw import generator
from moetrain.upcycle.importance import deal_by_importance, importance, most_wanted
from moetrain.upcycle.method import Job, Method, Promise, register
from moetrain.upcycle.options import MethodOptions, RouterStart
from moetrain.upcycle.plan import Plan
from moetrain.upcycle.router_start import cluster_directions


class SplitBy(Enum):
    """``random``; ``clusters``: balanced k-means of each unit's |activation| over the calibration tokens,
    at length 1, so that what counts is when a unit is active and not how strongly; ``gradients``: by
    |activation x gradient| on the tokens that lie nearest to an expert's router row."""

    random = "random"
    clusters = "clusters"
    gradients = "gradients"


@dataclass(frozen=True)
class SplitOptions(MethodOptions):
    """A shared expert takes the units with the largest mean |activation|, by gradients those that matter to
    the most experts. Its gate starts at zero, where it halves the expert, whose down projection is doubled.

    By gradients, the rows of ``router_start=centroids`` say whose tokens are an expert's; another start
    leaves the router to find them.
    """

    name: str = "split"
    by: SplitBy = SplitBy.random
    scale: Optional[float] = None  # on the down projections; null: by the router, E / (k w)


@register("split", SplitOptions, "Zhang et al. 2022, arXiv:2110.01786; Qu et al. 2024, arXiv:2411.15708")
class Split(Method[SplitOptions]):
    fills_shared = True

    def check(self, job: Job) -> None:
        cfg, shared = job.target.model, job.target.model.shared_width
        held = cfg.num_experts * cfg.d_ff_expert + shared
        if held != job.d_ff:
            raise UserError(
                f"num_experts * d_ff_expert + shared units = {cfg.num_experts} * {cfg.d_ff_expert} + "
                f"{shared} = {held} must be the source's d_ff={job.d_ff}"
            )
        if not self._scale(job) > 0:
            raise UserError(f"method.scale={self.options.scale} must be positive, or null")

    def plan(self, job: Job, layer: int, calibration: LayerCalibration | None) -> Plan:
        cfg, rest = job.target.model, torch.arange(job.d_ff)
        if self.options.by is SplitBy.gradients:
            return self._by_gradients(job, layer, calibration)
        hidden_TN, shared_Q = None, None
        if self.options.by is SplitBy.clusters or cfg.num_shared_experts:
            wanted_by = "method.by=clusters" if self.options.by is SplitBy.clusters else "a shared expert"
            hidden_TN = need(calibration, "hidden_TF", job.d_ff, layer, wanted_by).double().abs()
        if cfg.num_shared_experts and hidden_TN is not None:
            order_N = hidden_TN.mean(0).sort(descending=True, stable=True).indices
            width = job.target.model.shared_width
            shared_Q, rest = order_N[:width].sort().values, order_N[width:].sort().values
        groups_EF = self._deal(rest, hidden_TN, cfg.num_experts, generator(job.seed, layer, "split"))
        return self._plan(job, groups_EF, shared_Q)

    def promise(self, job: Job) -> Promise:
        combine, num_experts = job.target.combine, job.target.model.num_experts
        if combine.top_k != num_experts:
            return Promise(False, f"a token sees {combine.top_k} of {num_experts} parts of the network")
        if combine.drops:
            return Promise(False, CAPACITY)
        if self.options.router_start is not RouterStart.zeros:
            return Promise(
                False, "the parts' weights differ by token; method.router_start=zeros makes them even"
            )
        if combine.even_weight is None or abs(self._scale(job) * combine.even_weight - 1) > 1e-12:
            return Promise(False, f"method.scale={self._scale(job):g} does not undo the routing weights")
        return Promise(
            True, "a token sees all parts of the network, and their factor undoes the even weights"
        )

    def reads_text(self, job: Job) -> bool:
        shared = job.target.model.num_shared_experts > 0
        return shared or self.options.by is not SplitBy.random or super().reads_text(job)

    def reads_gradients(self, job: Job) -> bool:
        return self.options.by is SplitBy.gradients

    def notes(self, job: Job) -> list[str]:
        return [f"down projections of the experts times {self._scale(job):.6g}"]

    def _by_gradients(self, job: Job, layer: int, calibration: LayerCalibration | None) -> Plan:
        cfg, wanted_by = job.target.model, "method.by=gradients"
        towards_ED = cluster_directions(calibration, cfg.num_experts, cfg.d_model, job.seed, layer, wanted_by)
        inputs_TD = need(calibration, "inputs_TD", cfg.d_model, layer, wanted_by)
        saliency_TN = need(calibration, "saliency_TF", job.d_ff, layer, wanted_by)
        importance_EN = importance(saliency_TN, inputs_TD, towards_ED)
        shared_Q, rest = None, torch.arange(job.d_ff)
        if cfg.num_shared_experts:
            shared_Q = most_wanted(importance_EN, cfg.d_ff_expert, cfg.shared_width)
            rest = rest[~torch.isin(rest, shared_Q)]
        groups_EF = deal_by_importance(importance_EN, rest)
        return replace(self._plan(job, groups_EF, shared_Q), towards_VD=towards_ED)

    def _plan(self, job: Job, groups_EF: Tensor, shared_Q: Tensor | None) -> Plan:
        cfg = job.target.model
        return Plan(
            torch.zeros(cfg.num_experts, dtype=torch.int64),
            groups_EF,
            down_scale=self._scale(job),
            shared_Q=shared_Q,
            shared_scale=2.0 if cfg.shared_gate else 1.0,
        )

    def _deal(self, units_n: Tensor, hidden_TN: Tensor | None, parts: int, gen: torch.Generator) -> Tensor:
        """[E, F], ascending in each expert."""
        if self.options.by is SplitBy.random or hidden_TN is None:
            dealt_n = units_n[torch.randperm(len(units_n), generator=gen)]
        else:
            active_nT = torch.nn.functional.normalize(hidden_TN[:, units_n].t(), dim=1)
            cluster_n, _ = balanced_kmeans(active_nT, parts, gen)
            dealt_n = units_n[cluster_n.argsort(stable=True)]
        return dealt_n.view(parts, -1).sort(1).values

    def _scale(self, job: Job) -> float:
        if self.options.scale is not None:
            return self.options.scale
        combine, num_experts = job.target.combine, job.target.model.num_experts
        if combine.top_k is None or combine.even_weight is None:
            raise UserError(
                f"the weights of router={job.target.router.name} are not known, and so neither is the factor "
                f"that undoes them: set method.scale ({num_experts} where they sum to 1)"
            )
        return num_experts / (combine.top_k * combine.even_weight)

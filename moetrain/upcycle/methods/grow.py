"""More experts from a trained MoE: copies of its experts and of their router rows.

With E' = m E experts, expert e becomes the neighbours m e to m e + m - 1. Copies have equal scores and ties
go by index, so that top_k' = m top_k takes all copies of what the source would take, each at 1 / m of
the weight: a softmax over all experts gives that by itself, renormalised weights of any score do too, and
sigmoid weights as they are do not. Where scores are a softmax, copies share them, and the selection bias that
is added to them is divided by m as well. (Aggregation of experts: Kim et al. 2021, arXiv:2109.10465.)

Shapes: E experts of the target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moetrain.moe.combine import CAPACITY
from moetrain.moe.routers import full_options
from moetrain.moe.routers.topk import GroupScore, Score, TopKOptions
from moetrain.upcycle.calibration import LayerCalibration
from moetrain.upcycle.method import Job, Method, Promise, register, same_share
from moetrain.upcycle.options import MethodOptions
from moetrain.upcycle.plan import Plan, whole_networks


@dataclass(frozen=True)
class GrowOptions(MethodOptions):
    name: str = "grow"


@register("grow", GrowOptions, "Kim et al. 2021, arXiv:2109.10465")
class Grow(Method[GrowOptions]):
    reads_moe = True

    def check(self, job: Job) -> None:
        same_share(job, "experts of the source")

    def plan(self, job: Job, layer: int, calibration: LayerCalibration | None) -> Plan:
        copies = same_share(job, "experts of the source")
        plan = whole_networks(torch.arange(job.sources).repeat_interleave(copies), job.d_ff)
        return plan if job.target.combine.own_scores else replace(plan, bias_scale=1 / copies)

    def promise(self, job: Job) -> Promise:
        copies = same_share(job, "experts of the source")
        if (lost := self._lost(job, copies)) is not None:
            return Promise(False, lost)
        return Promise(
            True, f"tokens take all {copies} copies of the source's choice, which share its weight"
        )

    def _lost(self, job: Job, copies: int) -> str | None:
        if job.source_router is None:
            return "the source's router options are not known"
        old, new = full_options(job.source_router), full_options(job.target.router)
        if not isinstance(old, TopKOptions) or not isinstance(new, TopKOptions):
            return f"routers {old.name} and {new.name} are not both top-k routers"
        before, after = old.combine(job.sources), new.combine(job.sources * copies)
        if before.top_k is None or after.top_k != copies * before.top_k:
            return f"router.top_k={after.top_k} is not {copies} times the source's {before.top_k}"
        if replace(old, top_k=None) != replace(new, top_k=None):
            return "the routers differ in more than top_k"
        if after.drops:
            return CAPACITY
        if after.num_groups > 1 and new.group_score is not GroupScore.max and copies > 1:
            return "router.group_score=top2 ranks groups by two copies of one expert"
        if new.score is Score.sigmoid and not new.renormalize and copies > 1:
            return f"sigmoid weights that are not renormalised count each expert {copies} times"
        return None

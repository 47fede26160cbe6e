"""The dense network as it is, shared by experts that are low-rank products (MixLoRA; Li et al. 2024,
arXiv:2404.15159)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetrain.moe.options import ExpertKind
from moetrain.upcycle.calibration import LayerCalibration
from moetrain.upcycle.method import Job, Method, Promise, identical_experts, register, same_width
from moetrain.upcycle.options import MethodOptions
from moetrain.upcycle.plan import Plan, whole_networks


@dataclass(frozen=True)
class LowRankOptions(MethodOptions):
    name: str = "low_rank"


@register("low_rank", LowRankOptions, "Li et al. 2024, arXiv:2404.15159")
class LowRank(Method[LowRankOptions]):
    """The products are drawn as all of ``model.lora`` are, and zero at first; a router is all that is new."""

    makes = ExpertKind.low_rank

    def check(self, job: Job) -> None:
        same_width(job)

    def plan(self, job: Job, layer: int, calibration: LayerCalibration | None) -> Plan:
        return whole_networks(torch.zeros(job.target.model.num_experts, dtype=torch.int64), 0)

    def promise(self, job: Job) -> Promise:
        return identical_experts(job)

"""The dense network as it is, shared by adapters as experts (PESC; Wu et al. 2024, arXiv:2401.02731).

Shapes: E experts, D model, F width of an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetrain.moe.options import ExpertKind
from moetrain.upcycle.calibration import LayerCalibration
from moetrain.upcycle.draw import generator, normal
from moetrain.upcycle.method import Job, Method, Promise, register
from moetrain.upcycle.networks import Networks
from moetrain.upcycle.options import MethodOptions
from moetrain.upcycle.plan import Plan, whole_networks


@dataclass(frozen=True)
class AdaptersOptions(MethodOptions):
    name: str = "adapters"


@register("adapters", AdaptersOptions, "Wu et al. 2024, arXiv:2401.02731")
class Adapters(Method[AdaptersOptions]):
    """Up projections are drawn with std 1 / sqrt(D), down projections are zero: adapters add nothing yet."""

    makes = ExpertKind.adapters

    def plan(self, job: Job, layer: int, calibration: LayerCalibration | None) -> Plan:
        return whole_networks(torch.zeros(job.target.model.num_experts, dtype=torch.int64), 0)

    def experts(self, networks: Networks, plan: Plan, job: Job, layer: int) -> Networks:
        cfg, dtype = job.target.model, networks.w_down_SFD.dtype
        shape = (cfg.num_experts, cfg.d_model, cfg.d_ff_expert)
        up_EDF = normal(shape, generator(job.seed, layer, "adapters"), dtype) * cfg.d_model**-0.5
        return Networks(
            up_EDF.to(dtype)[:, :, None], torch.zeros(shape, dtype=dtype).transpose(1, 2).contiguous()
        )

    def promise(self, job: Job) -> Promise:
        return Promise(True, "the network is unchanged, and every adapter's down projection is zero")

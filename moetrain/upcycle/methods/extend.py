"""New experts beside those of a trained MoE, which stay: ModuleFormer's growth (Shen et al. 2023).

The first E experts and their router rows are the source's to the bit; the others begin as an expert and a row
of a new model do. So tokens may take new experts at once, and the function changes; training then holds the
old ones (``experts.frozen``, ``router.held``). The paper (arXiv:2306.04640) was read in summaries alone.

Shapes: E experts of the target, M matrices, F hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch

from moetrain.bounds import above
from moetrain.errors import UserError
from moetrain.upcycle.calibration import LayerCalibration
from moetrain.upcycle.draw import generator, normal
from moetrain.upcycle.method import Job, Method, Promise, register, same_width
from moetrain.upcycle.networks import Networks
from moetrain.upcycle.options import MethodOptions
from moetrain.upcycle.plan import Plan, whole_networks


@dataclass(frozen=True)
class ExtendOptions(MethodOptions):
    name: str = "extend"
    # standard deviation of new experts' weights; null: model.init_std
    expert_std: Optional[float] = field(default=None, metadata=above(0))


@register("extend", ExtendOptions, "Shen et al. 2023, arXiv:2306.04640")
class Extend(Method[ExtendOptions]):
    reads_moe = True

    def check(self, job: Job) -> None:
        same_width(job)
        if (wanted := job.target.model.num_experts) < job.sources:
            raise UserError(
                f"model.num_experts={wanted} is less than the source's {job.sources}: method=extend adds some"
            )

    def plan(self, job: Job, layer: int, calibration: LayerCalibration | None) -> Plan:
        wanted = job.target.model.num_experts
        source_E = torch.arange(wanted).clamp(max=job.sources - 1)
        fresh_E = torch.arange(wanted) >= job.sources
        matrices = 3 if job.target.gated else 2
        fresh_EMF = fresh_E[:, None, None].expand(wanted, matrices, job.d_ff)
        return Plan(
            source_E, whole_networks(source_E, job.d_ff).units_EF, fresh_EMF=fresh_EMF, fresh_E=fresh_E
        )

    def redraw(self, experts: Networks, plan: Plan, job: Job, layer: int) -> None:
        std = job.target.model.init_std if self.options.expert_std is None else self.options.expert_std
        gen = generator(job.seed, layer, "new experts")
        for stack in (experts.w_gate_up_SDCF, experts.w_down_SFD):
            for weight in stack[job.sources :]:
                weight.copy_(normal(weight.shape, gen, weight.dtype) * std)

    def promise(self, job: Job) -> Promise:
        if new := job.target.model.num_experts - job.sources:
            return Promise(False, f"tokens may take {new} new experts of each layer")
        return Promise(False, "no expert is new; the source itself is the same model")

    def notes(self, job: Job) -> list[str]:
        old = job.sources
        return [f"{old} experts of each layer are the source's: experts.frozen={old} holds them in training"]

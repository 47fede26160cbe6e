"""EvoMoE's expert-diversify: copies of one network, each with its own entries masked (Nie et al. 2021,
arXiv:2112.14397).

The paper trains one expert, a dense network here, and spawns the experts from it. Neither its text nor code
of this phase was read (the released code has none): masked entries are 0, chosen at random by themselves.

Shapes: E experts, S experts made, C = 2 where there is a gate, D model, F hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moetrain.bounds import within
from moetrain.upcycle.calibration import LayerCalibration
from moetrain.upcycle.draw import generator
from moetrain.upcycle.method import Job, Method, Promise, identical_experts, register, same_width
from moetrain.upcycle.networks import Networks
from moetrain.upcycle.options import MethodOptions
from moetrain.upcycle.plan import Plan, whole_networks


@dataclass(frozen=True)
class DiversifyOptions(MethodOptions):
    name: str = "diversify"
    # of each expert's entries, chosen at random: they begin at 0, and are trained on like the others
    mask_fraction: float = field(default=0.1, metadata=within(0, 1))


@register("diversify", DiversifyOptions, "Nie et al. 2021, arXiv:2112.14397")
class Diversify(Method[DiversifyOptions]):
    """Experts differ where one of them is masked, and are the source's network elsewhere."""

    def check(self, job: Job) -> None:
        same_width(job)

    def plan(self, job: Job, layer: int, calibration: LayerCalibration | None) -> Plan:
        return whole_networks(torch.zeros(job.target.model.num_experts, dtype=torch.int64), job.d_ff)

    def redraw(self, experts: Networks, plan: Plan, job: Job, layer: int) -> None:
        if not self.options.mask_fraction:
            return
        gen = generator(job.seed, layer, "masks")
        for stack in (experts.w_gate_up_SDCF, experts.w_down_SFD):
            for weight in stack:  # expert by expert: a draw is no larger than one
                masked = torch.rand(weight.shape, generator=gen) < self.options.mask_fraction
                weight.masked_fill_(masked, 0.0)

    def promise(self, job: Job) -> Promise:
        if fraction := self.options.mask_fraction:
            return Promise(False, f"{fraction:g} of each expert's entries were masked")
        return identical_experts(job)

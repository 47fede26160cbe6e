"""Every expert a copy of the dense network (Komatsuzaki et al. 2022, arXiv:2212.05055), with noise if wanted.

Shapes: E experts, F hidden, D model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moetrain.bounds import at_least, within
from moetrain.upcycle.calibration import LayerCalibration
from moetrain.upcycle.draw import generator, normal
from moetrain.upcycle.method import Job, Method, Promise, identical_experts, register, same_width
from moetrain.upcycle.networks import Networks
from moetrain.upcycle.options import MethodOptions
from moetrain.upcycle.plan import Plan, whole_networks


@dataclass(frozen=True)
class CopyOptions(MethodOptions):
    name: str = "copy"
    # of a normal draw that is added; 0: plain copies
    noise_std: float = field(default=0.0, metadata=at_least(0))
    # of each expert's entries, chosen at random, that get it
    noise_fraction: float = field(default=0.5, metadata=within(0, 1))


@register("copy", CopyOptions, "Komatsuzaki et al. 2022, arXiv:2212.05055")
class Copy(Method[CopyOptions]):
    """Optimizer state is copied for noisy entries too: they are the old weights, moved a little."""

    def check(self, job: Job) -> None:
        same_width(job)

    def plan(self, job: Job, layer: int, calibration: LayerCalibration | None) -> Plan:
        return whole_networks(torch.zeros(job.target.model.num_experts, dtype=torch.int64), job.d_ff)

    def redraw(self, experts: Networks, plan: Plan, job: Job, layer: int) -> None:
        if not self._noisy:
            return
        gen = generator(job.seed, layer, "noise")
        for stack in (experts.w_gate_up_SDCF, experts.w_down_SFD):
            for weight in stack:  # expert by expert: a draw is no larger than one
                noise = normal(weight.shape, gen, weight.dtype) * self.options.noise_std
                hit = torch.rand(weight.shape, generator=gen) < self.options.noise_fraction
                weight.copy_(torch.where(hit, weight + noise, weight))

    def promise(self, job: Job) -> Promise:
        if self._noisy:
            return Promise(False, f"noise of std {self.options.noise_std:g} was added to the copies")
        return identical_experts(job)

    @property
    def _noisy(self) -> bool:
        return self.options.noise_std > 0 and self.options.noise_fraction > 0

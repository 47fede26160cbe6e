"""Every expert a copy of the dense network (Komatsuzaki et al. 2022, arXiv:2212.05055), with noise if wanted.

Shapes: E experts, F hidden, D model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetrain.errors import UserError
from moetrain.upcycle.calibration import LayerCalibration
from moetrain.upcycle.draw import generator, normal
from moetrain.upcycle.method import Job, Method, Promise, identical_experts, register, same_width
from moetrain.upcycle.networks import Networks
from moetrain.upcycle.options import MethodOptions
from moetrain.upcycle.plan import Plan, whole_networks


@dataclass(frozen=True)
class CopyOptions(MethodOptions):
    name: str = "copy"
    noise_std: float = 0.0  # of a normal draw that is added; 0: plain copies
    noise_fraction: float = 0.5  # of each expert's entries, chosen at random, that get it


@register("copy", CopyOptions, "Komatsuzaki et al. 2022, arXiv:2212.05055")
class Copy(Method[CopyOptions]):
    """Optimizer state is copied for noisy entries too: they are the old weights, moved a little."""

    def check(self, job: Job) -> None:
        same_width(job)
        if self.options.noise_std < 0:
            raise UserError(f"method.noise_std={self.options.noise_std} must not be negative")
        if not 0 <= self.options.noise_fraction <= 1:
            raise UserError(f"method.noise_fraction={self.options.noise_fraction} must lie in [0, 1]")

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

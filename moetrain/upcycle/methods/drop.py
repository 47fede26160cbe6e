"""Drop-Upcycling: copies of which a part is drawn anew (Nakamura et al. 2025, arXiv:2502.19261).

Shapes: E experts, M matrices (gate where there is one, up, down), F hidden, D model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetrain.bounds import within
from moetrain.upcycle.calibration import LayerCalibration
from moetrain.upcycle.draw import generator, normal, wide
from moetrain.upcycle.method import Job, Method, Promise, identical_experts, register, same_width
from moetrain.upcycle.networks import Networks
from moetrain.upcycle.options import MethodOptions
from moetrain.upcycle.plan import Plan


@dataclass(frozen=True)
class DropOptions(MethodOptions):
    """``independent_sets``: other units in gate, up and down; else a unit is kept whole or drawn whole."""

    name: str = "drop"
    # of each expert's hidden units, to the nearest unit
    drop_ratio: float = field(default=0.5, metadata=within(0, 1))
    independent_sets: bool = False


@register("drop", DropOptions, "Nakamura et al. 2025, arXiv:2502.19261")
class Drop(Method[DropOptions]):
    """Each expert permutes the hidden units, alike in all matrices, and draws some of them anew.

    New values are normal, with the mean and standard deviation of those that they replace, by matrix.
    """

    def check(self, job: Job) -> None:
        same_width(job)

    def plan(self, job: Job, layer: int, calibration: LayerCalibration | None) -> Plan:
        num_experts, gen = job.target.model.num_experts, generator(job.seed, layer, "permutation")
        units_EF = torch.stack([torch.randperm(job.d_ff, generator=gen) for _ in range(num_experts)])
        source_E = torch.zeros(num_experts, dtype=torch.int64)
        return Plan(source_E, units_EF, fresh_EMF=self._fresh(job, layer))

    def redraw(self, experts: Networks, plan: Plan, job: Job, layer: int) -> None:
        if plan.fresh_EMF is None:
            return
        gen = generator(job.seed, layer, "new units")
        for m, matrix_EFD in enumerate(experts.matrices()):
            for e, matrix_FD in enumerate(matrix_EFD):
                fresh_F = plan.fresh_EMF[e, m]
                old_nD = matrix_FD[fresh_F].to(wide(matrix_FD.dtype))
                std, mean = torch.std_mean(old_nD, correction=0)
                matrix_FD[fresh_F] = (normal(old_nD.shape, gen, old_nD.dtype) * std + mean).to(
                    matrix_FD.dtype
                )

    def promise(self, job: Job) -> Promise:
        if new := self._new_units(job):
            return Promise(False, f"{new} of {job.d_ff} hidden units of each expert were drawn anew")
        return identical_experts(job)

    def notes(self, job: Job) -> list[str]:
        return [f"{self._new_units(job)} of {job.d_ff} hidden units of each expert were drawn anew"]

    def _new_units(self, job: Job) -> int:
        return round(self.options.drop_ratio * job.d_ff)

    def _fresh(self, job: Job, layer: int) -> Tensor | None:
        new, matrices = self._new_units(job), 3 if job.target.gated else 2
        if not new:
            return None
        gen = generator(job.seed, layer, "which units")
        fresh_EMF = torch.zeros(job.target.model.num_experts, matrices, job.d_ff, dtype=torch.bool)
        for fresh_MF in fresh_EMF:
            if self.options.independent_sets:
                for fresh_F in fresh_MF:
                    fresh_F[torch.randperm(job.d_ff, generator=gen)[:new]] = True
            else:
                fresh_MF[:, torch.randperm(job.d_ff, generator=gen)[:new]] = True
        return fresh_EMF

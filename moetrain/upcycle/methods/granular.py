"""Slices of the dense network as experts, in virtual groups (He et al. 2024, arXiv:2410.07524).

The dense network's hidden units are cut into G = d_ff / d_ff_expert slices; expert e gets slice e mod G.
Neighbouring experts j G to j G + G - 1 hold all slices and share one router row: a virtual group. Their
scores are equal and ties go by index, so that top_k = G m chooses m whole groups, m copies of the network.

With w the weight of a chosen expert where all score alike, m groups give m w times the network, so that the
factor is 1 / (m w): G where weights are renormalised, E G / k for a softmax over all E experts (where it is
exact for even scores only).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional

import torch

from moetrain.errors import UserError
from moetrain.upcycle.calibration import LayerCalibration
from moetrain.upcycle.method import Job, Method, Promise, register
from moetrain.upcycle.options import MethodOptions
from moetrain.upcycle.plan import Plan


class ScaleOn(Enum):
    """Where the factor s goes. ``down``: on the down projection, exact for any activation.

    ``all``: as published, on all matrices: s^(1/3) each of three, or of two where the activation squares,
    else s^(1/2). Exact where the activation is homogeneous (relu, relu2, reglu, drelu), close elsewhere.
    """

    down = "down"
    all = "all"


@dataclass(frozen=True)
class GranularOptions(MethodOptions):
    name: str = "granular"
    scale_on: ScaleOn = ScaleOn.down
    scale: Optional[float] = None  # null: by the router, 1 / (m w)


HOMOGENEOUS = ("relu", "relu2", "reglu", "drelu")


@register("granular", GranularOptions, "He et al. 2024, arXiv:2410.07524")
class Granular(Method[GranularOptions]):
    def check(self, job: Job) -> None:
        cfg, top_k = job.target.model, job.target.combine.top_k
        if job.d_ff % cfg.d_ff_expert:
            raise UserError(
                f"model.d_ff_expert={cfg.d_ff_expert} must divide the source's d_ff={job.d_ff} into slices"
            )
        slices = _slices(job)
        if cfg.num_experts % slices:
            raise UserError(
                f"model.num_experts={cfg.num_experts} must be a multiple of d_ff / d_ff_expert = "
                f"{job.d_ff} / {cfg.d_ff_expert} = {slices}, so that every slice is in each group"
            )
        if top_k is not None and top_k % slices:
            raise UserError(
                f"router.top_k={top_k} must be a multiple of d_ff / d_ff_expert = {job.d_ff} / "
                f"{cfg.d_ff_expert} = {slices}, so that tokens take whole groups"
            )
        if not self._scale(job) > 0:
            raise UserError(f"method.scale={self.options.scale} must be positive, or null")

    def plan(self, job: Job, layer: int, calibration: LayerCalibration | None) -> Plan:
        cfg, slices = job.target.model, _slices(job)
        first_E1 = (torch.arange(cfg.num_experts) % slices)[:, None] * cfg.d_ff_expert
        source_E = torch.zeros(cfg.num_experts, dtype=torch.int64)
        up_scale, down_scale = self._factors(job)
        units_EF = first_E1 + torch.arange(cfg.d_ff_expert)
        return Plan(source_E, units_EF, up_scale, down_scale, router_group=slices)

    def promise(self, job: Job) -> Promise:
        combine, slices, activation = job.target.combine, _slices(job), job.target.activation
        lost = combine.keeps_the_total()
        if lost is None and not combine.ties_whole:
            lost = "this router does not choose experts of one score together"
        if lost is None and job.target.model.num_experts // combine.num_groups % slices:
            lost = f"router.num_groups={combine.num_groups} cuts virtual groups of {slices} experts"
        if lost is None and abs(self._scale(job) * (combine.total or 0) / slices - 1) > 1e-12:
            lost = f"method.scale={self._scale(job):g} is not {slices / (combine.total or 1):g}"
        if lost is None and self.options.scale_on is ScaleOn.all and activation not in HOMOGENEOUS:
            lost = f"{activation} is not homogeneous, so that a factor before it is not one behind it"
        if lost is not None:
            return Promise(False, lost)
        return Promise(
            True, f"tokens choose whole groups of {slices} slices, whose factor undoes the weights"
        )

    def notes(self, job: Job) -> list[str]:
        up, down = self._factors(job)
        return [f"{_slices(job)} slices a network; gate and up times {up:.6g}, down times {down:.6g}"]

    def _scale(self, job: Job) -> float:
        if self.options.scale is not None:
            return self.options.scale
        combine = job.target.combine
        if combine.top_k is None or combine.even_weight is None:
            raise UserError(
                f"the weights of router={job.target.router.name} are not known, and so neither is the factor "
                f"that undoes them: set method.scale ({_slices(job)} where they sum to 1)"
            )
        return _slices(job) / (combine.top_k * combine.even_weight)

    def _factors(self, job: Job) -> tuple[float, float]:
        """(of gate and up, of down)."""
        scale = self._scale(job)
        if self.options.scale_on is ScaleOn.down:
            return 1.0, scale
        powers = 3 if job.target.gated or job.target.activation == "relu2" else 2
        each: float = scale ** (1 / powers)
        return each, each


def _slices(job: Job) -> int:
    """G."""
    return job.d_ff // job.target.model.d_ff_expert

"""The feed-forward networks of several dense models as experts (Sukhbaatar et al. 2024, arXiv:2403.07816).

Shapes: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from moetrain.upcycle.calibration import LayerCalibration
from moetrain.upcycle.method import Job, Method, Promise, identical_experts, register, same_share
from moetrain.upcycle.options import MethodOptions
from moetrain.upcycle.plan import Plan, whole_networks


class Rest(Enum):
    """Where everything outside the experts comes from: the mean over all models, or the first one."""

    mean = "mean"
    first = "first"


@dataclass(frozen=True)
class JoinOptions(MethodOptions):
    name: str = "join"
    rest: Rest = Rest.mean


@register("join", JoinOptions, "Sukhbaatar et al. 2024, arXiv:2403.07816")
class Join(Method[JoinOptions]):
    """With n models and E = c n experts, model i's networks are the c experts from c i on."""

    takes_donors = True

    def check(self, job: Job) -> None:
        same_share(job, "models to join")

    def plan(self, job: Job, layer: int, calibration: LayerCalibration | None) -> Plan:
        copies = same_share(job, "models to join")
        return whole_networks(torch.arange(job.sources).repeat_interleave(copies), job.d_ff)

    def promise(self, job: Job) -> Promise:
        if job.sources == 1:
            return identical_experts(job)
        return Promise(False, f"the experts are {job.sources} different networks, and the router is new")

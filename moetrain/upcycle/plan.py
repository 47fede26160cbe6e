"""A plan: where every hidden unit of every expert comes from. Weights and optimizer state follow the same.

Shapes: S source networks, E experts, D model, N hidden units of a source, F of an expert, Q of the shared
expert, C columns a hidden unit (2 where gated, else 1), M matrices (gate where there is one, up, down).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.upcycle.draw import wide
from moetrain.upcycle.networks import DenseLayer, Networks


@dataclass(frozen=True)
class Plan:
    """Expert e's unit f is unit ``units_EF[e, f]`` of network ``source_E[e]``, times the scales.

    up_scale, down_scale  factors of gate and up, and of down.
    fresh_EMF   bool: entries that are drawn anew after the copy; None: none are.
    shared_Q    units of network 0 that the shared expert takes; None: there is no shared expert.
    shared_scale  factor of its down projection.
    router_group  neighbouring experts that share one new router row.
    towards_VD  directions of new router rows, for ``router_start=centroids``; None: not found yet.
    bias_scale    factor of a selection bias that is copied with its router row.
    fresh_E       bool: experts whose router rows are drawn anew, where others are copied; None: none are.
    """

    source_E: Tensor
    units_EF: Tensor
    up_scale: float = 1.0
    down_scale: float = 1.0
    fresh_EMF: Tensor | None = None
    shared_Q: Tensor | None = None
    shared_scale: float = 1.0
    router_group: int = 1
    towards_VD: Tensor | None = None
    bias_scale: float = 1.0
    fresh_E: Tensor | None = None

    def rows(self, old: Tensor, new: Tensor | None = None) -> Tensor:
        """A router's rows of the experts, of the sources' ``old``; fresh ones are ``new``'s, or 0."""
        taken = old[self.source_E]
        if self.fresh_E is not None:
            taken[self.fresh_E] = 0 if new is None else new[self.fresh_E].to(taken.dtype)
        return taken


def whole_networks(source_E: Tensor, d_ff: int) -> Plan:
    """Each expert is a whole network."""
    return Plan(source_E, torch.arange(d_ff).expand(len(source_E), -1))


def take_experts(networks: Networks, plan: Plan, power: int = 1) -> Networks:
    """The experts [E, D, C, F], [E, F, D], in the sources' dtype.

    The scales are raised to ``power``. A weight w kept as w' = s w in a layer that computes the same has
    dL/dw' = (1 / s) dL/dw, so that first moments take power -1 and second ones -2.
    """
    num_experts, d_ff = plan.units_EF.shape
    width, up_SDCN, down_SFD = networks.w_down_SFD.shape[2], networks.w_gate_up_SDCF, networks.w_down_SFD
    taken_up = up_SDCN.new_empty(num_experts, width, networks.columns, d_ff)
    taken_down = down_SFD.new_empty(num_experts, d_ff, width)
    for e, source in enumerate(plan.source_E.tolist()):
        units_F = plan.units_EF[e]
        taken_up[e] = scaled(up_SDCN[source].index_select(-1, units_F), plan.up_scale**power)
        taken_down[e] = scaled(down_SFD[source].index_select(0, units_F), plan.down_scale**power)
    return Networks(taken_up, taken_down)


def take_shared(networks: Networks, plan: Plan, power: int = 1) -> DenseLayer | None:
    """The shared expert, of the first network's units, if the plan has one."""
    if plan.shared_Q is None:
        return None
    taken_CQD = networks.w_gate_up_SDCF[0].permute(1, 2, 0).index_select(1, plan.shared_Q)
    down_DQ = networks.w_down_SFD[0].index_select(0, plan.shared_Q).t().contiguous()
    return DenseLayer(taken_CQD.unbind(), scaled(down_DQ, plan.shared_scale**power))


def clear_fresh(experts: Networks, fresh_EMF: Tensor) -> None:
    """Zero, in place, what is drawn anew: it has no history."""
    for m, matrix_EFD in enumerate(experts.matrices()):
        matrix_EFD.masked_fill_(fresh_EMF[:, m, :, None], 0.0)


def scaled(values: Tensor, factor: float) -> Tensor:
    """Times ``factor``, rounded once."""
    return values if factor == 1.0 else (values.to(wide(values.dtype)) * factor).to(values.dtype)

"""MoE-X's router, which has no weights: it prefers experts whose hidden units it expects to be zero.

Taking the input weights of an expert's units as drawn from a normal distribution with mean mu_d and variance
v_d for each input d, a unit's pre-activation is normal with mean mu . x and variance sum v_d x_d^2, and is
positive with probability (1 + erf(s)) / 2, s = mu . x / sqrt(2 sum v_d x_d^2). An expert's logit is -erf(s)
(Yang et al. 2025, arXiv:2503.07639; written from a restatement of the paper's equations, whose body and code
were not read: whether gradients pass through mu and v there is not known; here they do).

Shapes: T tokens, D model, E experts, C = 1, F hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.moe.experts import Experts
from moetrain.moe.routers.topk import TopKOptions, TopKRouter
from moetrain.ops.held import held_rows

_LEAST = 1e-20  # of a variance: a token of zeros has logits of 0, and finite gradients


class SparsityRouter(TopKRouter):
    """:class:`TopKRouter` over such logits; ``options`` are its own."""

    def __init__(self, d_model: int, experts: Experts, options: TopKOptions) -> None:
        super().__init__(d_model, experts.num_experts, options)
        del self.weight_ED
        self._experts = (experts,)  # in a tuple: their weights are not the router's

    def rows_ED(self) -> None:
        """None: it compares tokens with whole experts."""

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E]. Raises ValueError where another rank holds some of the experts."""
        up_EDCF = self._experts[0].w_gate_up_EDCF
        if isinstance(up_EDCF, DTensor):
            raise ValueError(
                "MoE-X routes by all experts' weights, and this rank holds some: set parallel.ep=1"
            )
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        held_EDCF = held_rows(up_EDCF, self._experts[0].frozen)
        x_TD, up_EDF = x_TD.to(wide), held_EDCF.squeeze(2).to(wide)
        added = self._experts[0].added("w_gate_up_EDCF")
        if added is not None:
            a_EDR, b_ERF = added.a_EKR.to(wide), added.b_ERN.squeeze(2).to(wide)
            up_EDF = torch.baddbmm(up_EDF, a_EDR, b_ERF, alpha=added.factor)
        variance_ED, mean_ED = torch.var_mean(up_EDF, dim=2, correction=0)
        spread_TE = F.linear(x_TD.square(), variance_ED).clamp(min=_LEAST)
        return -torch.erf(F.linear(x_TD, mean_ED) / (2 * spread_TE).sqrt())

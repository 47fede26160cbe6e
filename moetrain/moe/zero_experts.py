"""Experts without a feed-forward network: zero, copy and constant (MoE++; Jin et al. 2024, arXiv:2410.07348).

They are the last experts of an assignment. Every rank has them, so no layout sends tokens to them.

Shapes: T tokens, D model, Z zero-computation experts (zero, then copy, then constant), C constant ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe.assignment import Assignment
from moetrain.ops.init import Normal, parameter


@dataclass(frozen=True)
class ZeroKinds:
    """The number of experts of each kind, in the order in which they follow the feed-forward experts."""

    zero: int
    copy: int
    constant: int

    @property
    def total(self) -> int:
        return self.zero + self.copy + self.constant


class ZeroExperts(nn.Module):
    """Outputs: zero 0, copy x, constant ``a x + b v`` with ``a, b = softmax(W x)``, v learnt (eq. 3 to 5)."""

    def __init__(self, d_model: int, kinds: ZeroKinds) -> None:
        super().__init__()
        self.kinds = kinds
        if kinds.constant:  # no parameter is empty
            self.mix_weight_KD = parameter((2 * kinds.constant, d_model), Normal(d_model**-0.5))
            self.constant_CD = parameter((kinds.constant, d_model), Normal(d_model**-0.5))

    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        """The weighted sum of each token's zero-computation experts; of x's shape, fp32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            x_TD = x.reshape(-1, x.shape[-1]).to(wide)
            weights_TZ = self._weights(assignment, x_TD)
            first = self.kinds.zero + self.kinds.copy
            scale_T1 = weights_TZ[:, self.kinds.zero : first].sum(-1, keepdim=True)
            y_TD = scale_T1 * x_TD
            if self.kinds.constant:
                y_TD = y_TD + self._constants(x_TD, weights_TZ[:, first:])
        return y_TD.view(x.shape)

    def _constants(self, x_TD: Tensor, weights_TC: Tensor) -> Tensor:
        mix_TC2 = F.linear(x_TD, self.mix_weight_KD.to(x_TD.dtype)).unflatten(-1, (-1, 2)).softmax(-1)
        scale_T1 = (weights_TC * mix_TC2[..., 0]).sum(-1, keepdim=True)
        constant_CD = self.constant_CD.to(x_TD.dtype)
        y_TD: Tensor = scale_T1 * x_TD + (weights_TC * mix_TC2[..., 1]) @ constant_CD
        return y_TD

    def _weights(self, assignment: Assignment, x_TD: Tensor) -> Tensor:
        """[T, Z]; a pair occurs once at most, so nothing is summed. No host synchronisation."""
        first = assignment.num_experts - self.kinds.total
        column_N = (assignment.expert_ids_N() - first + 1).clamp(min=0)  # 0: the others', cut off
        room_TZ = x_TD.new_zeros(x_TD.shape[0], self.kinds.total + 1)
        weights_N = assignment.weights_N.to(x_TD.dtype)
        weights_TZ: Tensor = room_TZ.index_put((assignment.token_ids_N, column_N), weights_N)
        return weights_TZ[:, 1:]

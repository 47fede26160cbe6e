"""Experts by ScatterMoE's products in Triton (Tan et al. 2024, arXiv:2403.08245), package ``scattermoe`` 0.3.

Rows come grouped and leave grouped: of its products only those of groups are used. Its gather inside a
product reads ``source[id // k]``, which suits k choices a token and no other number, and so does its sum.
Matrices are read in place, transposed ones too. Shapes as in ``products.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.ops.experts import products
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.operands import Operands
from moetrain.ops.experts.rows import all_rows
from moetrain.ops.experts.third_party import refusal_of_package, refusal_of_widths, require_addressable
from moetrain.ops.experts.triton_cases import block_experts_B

ON_DEVICE = True
WIDTH_UNIT = 32  # the depth of a step of its products
kept_rows = all_rows
_INSTALL = "pip install git+https://github.com/shawntan/scattermoe"


def refusal(case: Case) -> str | None:
    """Why ScatterMoE cannot serve ``case``."""
    return refusal_of_package(case, "scattermoe", _INSTALL) or refusal_of_widths(case, WIDTH_UNIT)


@dataclass(frozen=True)
class _Scattered:
    """``experts_R``: the expert of each row, int64, E behind the last. ``ends_E``: where its rows end."""

    experts_R: Tensor
    places_R: Tensor
    ends_E: Tensor

    @staticmethod
    def of(operands: Operands) -> _Scattered:
        segments = operands.segments
        experts_B = block_experts_B(segments, operands.num_rows).long()
        experts_B = experts_B.masked_fill(experts_B < 0, segments.num_experts)
        experts_R = experts_B.repeat_interleave(segments.block, output_size=operands.num_rows)
        places_R = torch.arange(operands.num_rows, device=experts_R.device)
        return _Scattered(experts_R, places_R, segments.aligned_E.cumsum(0))

    def of_rows(self, x_RA: Tensor, w_EAB: Tensor) -> Tensor:
        from scattermoe.kernels import ops

        out_RB = x_RA.new_empty(x_RA.shape[0], w_EAB.shape[2])
        require_addressable("scattermoe", rows=x_RA, matrices=w_EAB, products=out_RB)
        ops.scatter2scatter(
            x_RA, w_EAB, self.experts_R, self.places_R, 1, x_grouped=True, y_grouped=True, out=out_RB
        )
        return out_RB

    def of_weights(self, x_RA: Tensor, y_RB: Tensor) -> Tensor:
        from scattermoe.kernels import ops

        # y.T @ x, which it keeps transposed: the transpose is the tensor as it lies in memory
        dw_EBA: Tensor = ops.group_bwd_W(x_RA, y_RB, self.ends_E, len(self.ends_E))[0]
        return dw_EBA.transpose(1, 2)


def forward(operands: Operands, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """(out [R, D], [z [R, P]] or, not ``keep``, [])."""
    return products.forward(operands, keep, _Scattered.of(operands))


def backward(dout_RD: Tensor, operands: Operands, kept: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """(dx [R, D], dweights [R], dw_up, dw_down, and the biases'); experts without rows get zero gradients."""
    return products.backward(dout_RD, operands, kept, _Scattered.of(operands))

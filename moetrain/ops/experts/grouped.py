"""Expert MLP over all experts at once with ``torch.nn.functional.grouped_mm``: the path of a GPU.

Shapes as in ``operator.py``. Padding rows are zero, so aligned segments need no masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops.activations import activate, activate_again, activate_backward, gate_and_up
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.operands import Operands
from moetrain.ops.experts.rows import Segments, all_rows
from moetrain.ops.gather_sum import gather_rows
from moetrain.ops.grouped_mm import refusal as refusal_of_widths

ON_DEVICE = True
kept_rows = all_rows


def refusal(case: Case) -> str | None:
    """Why torch's product of groups cannot serve ``case``."""
    operands = (case.d_model, case.columns), (case.d_ff, case.d_model)
    reasons = [refusal_of_widths(case.device, case.dtype, widths) for widths in operands]
    return next((reason for reason in reasons if reason is not None), None)


def _ends(segments: Segments) -> Tensor:
    """The end of each expert's rows, int32, as torch's grouped_mm wants it."""
    return segments.aligned_E.cumsum(0, dtype=torch.int32)


def forward(operands: Operands, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """(out [R, D], [z [R, P]] or, not ``keep``, [])."""
    dtype, activation = operands.dtype, operands.activation
    ends_E = _ends(operands.segments)
    z_RP = _pre_activation(operands, ends_E)
    h_RF = activate(*gate_and_up(z_RP, activation), activation).mul_(operands.weights_R.to(dtype)[:, None])
    return F.grouped_mm(h_RF, operands.w_down_EFD.to(dtype), offs=ends_E), [z_RP] if keep else []


def backward(
    dout_RD: Tensor, operands: Operands, kept: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [R, D], dweights [R], dw_up, dw_down); experts without rows get zero gradients."""
    dtype, activation = operands.dtype, operands.activation
    w_up_EDP, w_down_EFD, weights_R = operands.w_up_EDP, operands.w_down_EFD, operands.weights_R
    ends_E = _ends(operands.segments)
    (z_RP,) = [_pre_activation(operands, ends_E)] if kept is None else kept
    scale_R1 = weights_R.to(dtype)[:, None]
    gate_RF, up_RF = gate_and_up(z_RP, activation)
    h_RF, active_RF = activate_again(gate_RF, up_RF, activation)
    dh_RF = F.grouped_mm(dout_RD, w_down_EFD.to(dtype).transpose(1, 2), offs=ends_E)
    dweights_R = torch.linalg.vecdot(dh_RF.to(weights_R.dtype), h_RF.to(weights_R.dtype))
    dw_down_EFD = F.grouped_mm(h_RF.t(), dout_RD * scale_R1, offs=ends_E).to(w_down_EFD.dtype)
    dz_RP = torch.empty_like(z_RP)
    dh_RF = dh_RF.mul_(scale_R1)
    activate_backward(dh_RF, gate_RF, up_RF, active_RF, activation, *gate_and_up(dz_RP, activation))
    x_RD = gather_rows(operands.source_XD, operands.ids_R)
    dw_up_EDP = F.grouped_mm(x_RD.t(), dz_RP, offs=ends_E).to(w_up_EDP.dtype)
    dx_RD = F.grouped_mm(dz_RP, w_up_EDP.to(dtype).transpose(1, 2), offs=ends_E)
    return dx_RD, dweights_R, dw_up_EDP, dw_down_EFD


def _pre_activation(operands: Operands, ends_E: Tensor) -> Tensor:
    x_RD = gather_rows(operands.source_XD, operands.ids_R)
    return F.grouped_mm(x_RD, operands.w_up_EDP.to(operands.dtype), offs=ends_E)

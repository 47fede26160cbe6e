"""The experts' feed-forward from two products of groups of rows: all that a library of such products gives.

Shapes as in ``operands.py``; A and B are widths of a product. Padding rows are zero, so aligned segments need
no masks; rows behind the last segment belong to no expert, and their results are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moetrain.ops.activations import activate, activate_again, activate_backward, gate_and_up
from moetrain.ops.experts.biases import add_biases, gradient_of_biases, times_biases
from moetrain.ops.experts.operands import Operands, Pair
from moetrain.ops.experts.triton_cases import block_experts_B
from moetrain.ops.gather_sum import gather_rows


class Products(Protocol):
    """Products over the segments of one call, all operands of one dtype."""

    def of_rows(self, x_RA: Tensor, w_EAB: Tensor) -> Tensor:
        """[R, B]: each expert's rows times its matrix."""

    def of_weights(self, x_RA: Tensor, y_RB: Tensor) -> Tensor:
        """[E, A, B]: each expert's rows ``x``, transposed, times its rows ``y``; zero without rows."""


def forward(operands: Operands, keep: bool, products: Products) -> tuple[Tensor, list[Tensor]]:
    """(out [R, D], [z [R, P]] or, not ``keep``, [])."""
    dtype, activation = operands.dtype, operands.activation
    z_RP = _pre_activation(operands, products)
    h_RF = activate(*gate_and_up(z_RP, activation), activation).mul_(operands.weights_R.to(dtype)[:, None])
    out_RD = products.of_rows(h_RF, operands.w_down_EFD.to(dtype))
    if operands.bias_down_ED is not None:
        add_biases(out_RD, operands.bias_down_ED, _experts_B(operands), operands.weights_R)
    return _with_product(out_RD, h_RF, operands.down, products), [z_RP] if keep else []


def backward(
    dout_RD: Tensor, operands: Operands, kept: Sequence[Tensor] | None, products: Products
) -> tuple[Tensor, ...]:
    """(dx [R, D], dweights [R], dw_up, dw_down, and the biases'); experts without rows get zero gradients."""
    dtype, activation = operands.dtype, operands.activation
    w_up_EDP, w_down_EFD, weights_R = operands.w_up_EDP, operands.w_down_EFD, operands.weights_R
    (z_RP,) = [_pre_activation(operands, products)] if kept is None else kept
    scale_R1 = weights_R.to(dtype)[:, None]
    gate_RF, up_RF = gate_and_up(z_RP, activation)
    h_RF, active_RF = activate_again(gate_RF, up_RF, activation)
    dh_RF = products.of_rows(dout_RD, w_down_EFD.to(dtype).transpose(1, 2))
    down, up, trained = operands.down, operands.up, operands.trained
    if down is not None:
        dh_RF = _backward_of_product(dh_RF, h_RF * scale_R1, dout_RD, down, products)
    dweights_R = torch.linalg.vecdot(dh_RF.to(weights_R.dtype), h_RF.to(weights_R.dtype))
    dw_up_EDP, dw_down_EFD, dbiases = w_up_EDP.new_empty(0), w_down_EFD.new_empty(0), list[Tensor]()
    if trained:
        scaled_RD = dout_RD * scale_R1
        dw_down_EFD = products.of_weights(h_RF, scaled_RD).to(w_down_EFD.dtype)
    dz_RP = torch.empty_like(z_RP)
    dh_RF = dh_RF.mul_(scale_R1)
    activate_backward(dh_RF, gate_RF, up_RF, active_RF, activation, *gate_and_up(dz_RP, activation))
    x_RD = gather_rows(operands.source_XD, operands.ids_R) if trained or up else None
    if trained and x_RD is not None:
        dw_up_EDP = products.of_weights(x_RD, dz_RP).to(w_up_EDP.dtype)
    dx_RD = products.of_rows(dz_RP, w_up_EDP.to(dtype).transpose(1, 2))
    if up is not None and x_RD is not None:
        dx_RD = _backward_of_product(dx_RD, x_RD, dz_RP, up, products)
    if operands.bias_up_EP is not None and operands.bias_down_ED is not None:
        experts_B = _experts_B(operands)
        dweights_R += times_biases(dout_RD, operands.bias_down_ED, experts_B, weights_R.dtype)
        if trained:
            dbiases.append(gradient_of_biases(dz_RP, operands.bias_up_EP, experts_B))
            dbiases.append(gradient_of_biases(scaled_RD, operands.bias_down_ED, experts_B))
    return dx_RD, dweights_R, dw_up_EDP, dw_down_EFD, *dbiases


def _experts_B(operands: Operands) -> Tensor:
    return block_experts_B(operands.segments, operands.num_rows)


def _pre_activation(operands: Operands, products: Products) -> Tensor:
    x_RD = gather_rows(operands.source_XD, operands.ids_R)
    z_RP = products.of_rows(x_RD, operands.w_up_EDP.to(operands.dtype))
    if operands.bias_up_EP is not None:
        add_biases(z_RP, operands.bias_up_EP, _experts_B(operands))
    return _with_product(z_RP, x_RD, operands.up, products)


def _with_product(y_RB: Tensor, x_RA: Tensor, pair: Pair | None, products: Products) -> Tensor:
    """``y + x a b``; ``y`` is overwritten."""
    if pair is None:
        return y_RB
    narrow_RL = products.of_rows(x_RA, pair.a_EKL.to(x_RA.dtype))
    return y_RB.add_(products.of_rows(narrow_RL, pair.b_ELN.to(x_RA.dtype)))


def _backward_of_product(
    dx_RA: Tensor, x_RA: Tensor, dy_RB: Tensor, pair: Pair, products: Products
) -> Tensor:
    """``dx`` with what comes through the product, overwritten; the factors' gradients are filled."""
    dtype, (da_EKL, db_ELN) = x_RA.dtype, pair.gradients
    a_EAL, b_ELB = pair.a_EKL.to(dtype), pair.b_ELN.to(dtype)
    dnarrow_RL = products.of_rows(dy_RB, b_ELB.transpose(1, 2))
    da_EKL.copy_(products.of_weights(x_RA, dnarrow_RL))
    db_ELN.copy_(products.of_weights(products.of_rows(x_RA, a_EAL), dy_RB))
    return dx_RA.add_(products.of_rows(dnarrow_RL, a_EAL.transpose(1, 2)))

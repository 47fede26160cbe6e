"""A dense feed-forward network that keeps its input and pre-activations for backward, and nothing else.

Shapes: leading dimensions of x are free, n rows in all; D model, F hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.ops.activations import activate, activate_again, activate_backward
from moetrain.ops.cpu.product import outer, product


def dense_mlp(
    x: Tensor, w_gate_FD: Tensor | None, w_up_FD: Tensor, w_down_DF: Tensor, activation: str
) -> Tensor:
    """``act(x @ w_gate.T) * (x @ w_up.T) @ w_down.T``, or ``act(x @ w_up.T) @ w_down.T`` without a gate.

    Products run in autocast's dtype where it is on; gradients come in the matrices' own.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x_nD = x.reshape(-1, x.shape[-1]).to(dtype)
    y_nD: Tensor = _DenseMLP.apply(x_nD, w_gate_FD, w_up_FD, w_down_DF, activation)  # type: ignore[no-untyped-call]
    return y_nD.view(*x.shape[:-1], w_down_DF.shape[0])


class _DenseMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_nD: Tensor, w_gate_FD: Tensor | None, w_up_FD: Tensor, w_down_DF: Tensor, activation: str
    ) -> Tensor:
        dtype = x_nD.dtype
        with torch.autocast(x_nD.device.type, enabled=False):
            gate_nF = None if w_gate_FD is None else product(x_nD, w_gate_FD.to(dtype).t())
            up_nF = product(x_nD, w_up_FD.to(dtype).t())
            ctx.save_for_backward(x_nD, gate_nF, up_nF, w_gate_FD, w_up_FD, w_down_DF)
            ctx.activation = activation
            return product(activate(gate_nF, up_nF, activation), w_down_DF.to(dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_nD: Tensor) -> tuple[Tensor | None, ...]:
        x_nD, gate_nF, up_nF, w_gate_FD, w_up_FD, w_down_DF = ctx.saved_tensors
        _, gate_wanted, up_wanted, down_wanted, _ = ctx.needs_input_grad
        dtype = x_nD.dtype
        h_nF, active_nF = activate_again(gate_nF, up_nF, ctx.activation)
        dw_down_DF = outer(dy_nD, h_nF).to(w_down_DF.dtype) if down_wanted else None
        dgate_nF, dup_nF = None if gate_nF is None else torch.empty_like(gate_nF), torch.empty_like(up_nF)
        dh_nF = product(dy_nD, w_down_DF.to(dtype))
        activate_backward(dh_nF, gate_nF, up_nF, active_nF, ctx.activation, dgate_nF, dup_nF)
        dw_up_FD = outer(dup_nF, x_nD).to(w_up_FD.dtype) if up_wanted else None
        dx_nD = product(dup_nF, w_up_FD.to(dtype))
        if dgate_nF is None:
            return dx_nD, None, dw_up_FD, dw_down_DF, None
        dx_nD += product(dgate_nF, w_gate_FD.to(dtype))
        dw_gate_FD = outer(dgate_nF, x_nD).to(w_gate_FD.dtype) if gate_wanted else None
        return dx_nD, dw_gate_FD, dw_up_FD, dw_down_DF, None

"""A dense feed-forward network that keeps its input and pre-activation for backward, and nothing else.

Shapes: leading dimensions of x are free, n rows in all; D model, F hidden, P = 2F (gated) or F.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.ops.activations import activate, activate_again, activate_backward
from moetrain.ops.cpu_product import product


def dense_mlp(x: Tensor, w_up_PD: Tensor, w_down_DF: Tensor, activation: str) -> Tensor:
    """``act(x @ w_up.T) @ w_down.T``; products in autocast's dtype where it is on, gradients in their own."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    y_nD: Tensor = _DenseMLP.apply(x.reshape(-1, x.shape[-1]).to(dtype), w_up_PD, w_down_DF, activation)  # type: ignore[no-untyped-call]
    return y_nD.view(*x.shape[:-1], w_down_DF.shape[0])


class _DenseMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nD: Tensor, w_up_PD: Tensor, w_down_DF: Tensor, activation: str) -> Tensor:
        with torch.autocast(x_nD.device.type, enabled=False):
            z_nP = product(x_nD, w_up_PD.to(x_nD.dtype).t())
            ctx.save_for_backward(x_nD, z_nP, w_up_PD, w_down_DF)
            ctx.activation = activation
            return product(activate(z_nP, activation), w_down_DF.to(x_nD.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_nD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_nD, z_nP, w_up_PD, w_down_DF = ctx.saved_tensors
        dtype = x_nD.dtype
        h_nF, active_nF = activate_again(z_nP, ctx.activation)
        dw_down_DF = (dy_nD.t() @ h_nF).to(w_down_DF.dtype)
        dz_nP = torch.empty_like(z_nP)
        activate_backward(product(dy_nD, w_down_DF.to(dtype)), z_nP, active_nF, ctx.activation, dz_nP)
        dw_up_PD = (dz_nP.t() @ x_nD).to(w_up_PD.dtype)
        return product(dz_nP, w_up_PD.to(dtype)), dw_up_PD, dw_down_DF, None

"""A plain feed-forward network: the dense layer, and the shared experts of an MoE layer.

Shapes: D model, F hidden, P = 2F (gated) or F; leading dimensions are free.
"""

from __future__ import annotations

from torch import Tensor, nn

from moetrain.ops.activations import is_gated
from moetrain.ops.dense_mlp import dense_mlp
from moetrain.ops.init import Normal, parameter


class MLP(nn.Module):
    """``act(x @ w_up) @ w_down``; for a gated activation the gate rows of ``w_gate_up_PD`` come first."""

    def __init__(self, d_model: int, d_ff: int, activation: str = "swiglu") -> None:
        super().__init__()
        self.activation = activation
        width = 2 * d_ff if is_gated(activation) else d_ff
        self.w_gate_up_PD = parameter((width, d_model), Normal(d_model**-0.5))
        self.w_down_DF = parameter((d_model, d_ff), Normal(d_ff**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return dense_mlp(x, self.w_gate_up_PD, self.w_down_DF, self.activation)

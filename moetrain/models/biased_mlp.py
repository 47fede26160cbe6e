"""A dense layer whose matrices have biases (Llama's ``mlp_bias``).

Shapes: D model, F hidden; leading dimensions are free.
"""

from __future__ import annotations

from torch import Tensor

from moetrain.moe import RouterContext, RoutingRecord
from moetrain.moe.mlp import MLP
from moetrain.ops.activations import activate, is_gated
from moetrain.ops.init import Constant, parameter
from moetrain.ops.low_rank import linear_beside, linears_beside


class BiasedFeedForward(MLP):
    """``act(x @ w_gate + b_gate) * (x @ w_up + b_up) @ w_down + b_down``; a plain activation has no gate.

    It keeps its activation for the backward pass, which a layer without biases computes again.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str) -> None:
        super().__init__(d_model, d_ff, activation)
        zero = Constant(0.0)
        self.b_gate_F = parameter((d_ff,), zero) if is_gated(activation) else None
        self.b_up_F = parameter((d_ff,), zero)
        self.b_down_D = parameter((d_model,), zero)

    def forward(  # type: ignore[override]
        self, x: Tensor, ctx: RouterContext | None = None
    ) -> tuple[Tensor, RoutingRecord | None]:
        if self.w_gate_FD is None:
            hidden = activate(None, linear_beside(x, self, "w_up_FD", self.b_up_F), self.activation)
        else:
            gate, up = linears_beside(x, self, ["w_gate_FD", "w_up_FD"], [self.b_gate_F, self.b_up_F])
            hidden = activate(gate, up, self.activation)
        return linear_beside(hidden, self, "w_down_DF", self.b_down_D), None

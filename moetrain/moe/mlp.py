"""A plain feed-forward network: the dense layer, and the shared experts of an MoE layer.

Shapes: D model, F hidden; leading dimensions are free.
"""

from __future__ import annotations

from torch import Tensor, nn

from moetrain.ops.activations import activate, is_gated
from moetrain.ops.dense_mlp import dense_mlp
from moetrain.ops.init import Normal, parameter
from moetrain.ops.low_rank import beside, linear_beside, linears_beside

MATRICES = ("w_gate_FD", "w_up_FD", "w_down_DF")


class MLP(nn.Module):
    """``(act(x @ w_gate) * (x @ w_up)) @ w_down``; without a gate ``act(x @ w_up) @ w_down``.

    ``w_gate_FD`` is None for a plain activation.
    """

    takes_low_rank = MATRICES

    def __init__(self, d_model: int, d_ff: int, activation: str = "swiglu") -> None:
        super().__init__()
        self.activation = activation
        up_shape, initializer = (d_ff, d_model), Normal(d_model**-0.5)
        self.w_gate_FD = parameter(up_shape, initializer) if is_gated(activation) else None
        self.w_up_FD = parameter(up_shape, initializer)
        self.w_down_DF = parameter((d_model, d_ff), Normal(d_ff**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return network(x, self, self.activation)


def network(x: Tensor, owner: nn.Module, activation: str) -> Tensor:
    """The network whose matrices are ``owner``'s, with the products beside them."""
    if all(beside(owner, leaf) is None for leaf in MATRICES):
        gate, up, down = (getattr(owner, leaf) for leaf in MATRICES)
        return dense_mlp(x, gate, up, down, activation)
    leaves = list(MATRICES[:2] if is_gated(activation) else MATRICES[1:2])
    *gated, z = linears_beside(x, owner, leaves)
    return linear_beside(activate(gated[0] if gated else None, z, activation), owner, MATRICES[2])

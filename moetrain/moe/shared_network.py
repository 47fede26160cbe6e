"""A layer around one dense network that all its experts share; its parameters are named as a dense layer's.

Shapes: D model, F hidden units of the network.
"""

from __future__ import annotations

from moetrain.moe.layer import MoELayer
from moetrain.moe.mlp import MATRICES
from moetrain.ops.activations import is_gated
from moetrain.ops.init import Normal, parameter


class SharedNetworkLayer(MoELayer):
    """What the kinds of such layers have in common: a subclass says what its experts add to the network."""

    takes_low_rank = MATRICES

    def make_network(self, d_model: int, d_ff: int, activation: str) -> None:
        """Make the network's matrices. Raises ValueError for an unknown activation."""
        self.activation = activation
        up_shape, initializer = (d_ff, d_model), Normal(d_model**-0.5)
        self.w_gate_FD = parameter(up_shape, initializer) if is_gated(activation) else None
        self.w_up_FD = parameter(up_shape, initializer)
        self.w_down_DF = parameter((d_model, d_ff), Normal(d_ff**-0.5))

"""A plain feed-forward network: the dense layer, and the shared experts of an MoE layer.

Shapes: D model, F hidden; leading dimensions are free.
"""

from __future__ import annotations

from torch import Tensor, nn

from moetrain.ops.activations import is_gated
from moetrain.ops.dense_mlp import dense_mlp
from moetrain.ops.init import Normal, parameter
from moetrain.ops.low_rank import LoRA, adapted, low_rank


class MLP(nn.Module):
    """``(act(x @ w_gate) * (x @ w_up)) @ w_down``; without a gate ``act(x @ w_up) @ w_down``.

    ``w_gate_FD`` is None for a plain activation. ``lora``: products that are added to the matrices.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "swiglu", lora: LoRA | None = None) -> None:
        super().__init__()
        self.activation = activation
        up_shape, initializer = (d_ff, d_model), Normal(d_model**-0.5)
        self.w_gate_FD = parameter(up_shape, initializer) if is_gated(activation) else None
        self.w_up_FD = parameter(up_shape, initializer)
        self.w_down_DF = parameter((d_model, d_ff), Normal(d_ff**-0.5))
        self.lora_gate = low_rank(d_ff, d_model, None if self.w_gate_FD is None else lora)
        self.lora_up = low_rank(d_ff, d_model, lora)
        self.lora_down = low_rank(d_model, d_ff, lora)

    def forward(self, x: Tensor) -> Tensor:
        w_gate_FD = None if self.w_gate_FD is None else adapted(self.w_gate_FD, self.lora_gate)
        w_up_FD, w_down_DF = adapted(self.w_up_FD, self.lora_up), adapted(self.w_down_DF, self.lora_down)
        return dense_mlp(x, w_gate_FD, w_up_FD, w_down_DF, self.activation)

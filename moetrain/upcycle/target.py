"""The model that upcycling makes."""

from __future__ import annotations

from dataclasses import dataclass, field

from moetrain.errors import UserError
from moetrain.models.options import ModelConfig
from moetrain.models.places import is_moe_layer
from moetrain.moe.combine import Combine
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.moe.routers import full_options
from moetrain.ops.activations import is_gated


@dataclass(frozen=True)
class Target:
    """The MoE model's own config sections. ``model.d_ff`` is the width of the layers that stay dense."""

    model: ModelConfig
    router: RouterConfig
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)

    def __post_init__(self) -> None:
        if not self.layers:
            cfg = self.model
            raise UserError(
                f"no layer of the target is MoE: model.num_experts={cfg.num_experts}, first_dense="
                f"{cfg.first_dense}, moe_every={cfg.moe_every}, num_layers={cfg.num_layers}"
            )

    @property
    def layers(self) -> list[int]:
        """The layers that become MoE."""
        return [i for i in range(self.model.num_layers) if is_moe_layer(self.model, i)]

    @property
    def combine(self) -> Combine:
        return full_options(self.router).combine(self.model.num_experts)

    @property
    def activation(self) -> str:
        return self.experts.activation.value

    @property
    def gated(self) -> bool:
        return is_gated(self.activation)

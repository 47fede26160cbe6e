"""A feed-forward layer as a plug-in may write it: torch's modules, nn.init, and a buffer of its weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.models.options import ModelConfig
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.ops.init import Constant, Normal, parameter


class OwnLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.declared_DD = parameter((width, width), Normal(2.0))
        self.declared_D = parameter((width,), Constant(0.25))
        self.written_DD = parameter((width, width), Normal(0.5))
        nn.init.eye_(self.written_DD)
        self.register_buffer("largest", self.linear.weight.detach().abs().max())

    def forward(self, x_BSD: Tensor, ctx: object = None) -> tuple[Tensor, None]:
        y_BSD = self.linear(self.norm(x_BSD)) + F.linear(x_BSD, self.declared_DD + self.written_DD)
        return y_BSD * self.declared_D, None


def build(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
    return OwnLayer(cfg.d_model)


def expected(layer: OwnLayer, seed: int) -> dict[str, Tensor]:
    """What a layer starts from that is the first to draw after ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    width = layer.linear.in_features
    linear = nn.Linear(width, width)
    return {
        "linear.weight": linear.weight.detach(),
        "linear.bias": linear.bias.detach(),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
        "written_DD": torch.eye(width),
        "declared_D": torch.full((width,), 0.25),
        "largest": linear.weight.detach().abs().max(),
    }

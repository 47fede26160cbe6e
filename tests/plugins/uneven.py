"""A plug-in decoder whose layers differ: ``plugins=[uneven]``, ``model.feed_forward=uneven``.

Its layers have 4, 6 and 0 experts: an MoELayer by the config's router, one inside another module by a router
of its own, and a dense network.
"""

from __future__ import annotations

from torch import Tensor, nn

from moetrain.models.feed_forward import DenseFeedForward, register_feed_forward
from moetrain.models.options import ModelConfig
from moetrain.moe import MoELayer, RouterContext, Routing
from moetrain.moe.options import ExpertsConfig, RouterConfig

EXPERTS = (4, 6, 0)


class Halved(nn.Module):
    """Half of what the layer inside gives."""

    def __init__(self, inner: MoELayer) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BSD: Tensor, ctx: RouterContext) -> tuple[Tensor, Routing]:
        y_BSD, routing = self.inner(x_BSD, ctx)
        return y_BSD / 2, routing


@register_feed_forward("uneven", on_meta=True)
def build(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
    if cfg.num_layers != len(EXPERTS):
        raise ValueError(f"there are {len(EXPERTS)} layers, and model.num_layers={cfg.num_layers}")
    number, activation = EXPERTS[layer], experts.activation.value
    if not number:
        return DenseFeedForward(cfg.d_model, cfg.d_ff, activation)
    if layer == 0:
        return MoELayer(cfg.d_model, cfg.d_ff_expert, number, router.name, router, activation)
    return Halved(MoELayer(cfg.d_model, cfg.d_ff_expert, number, "sigmoid", {"top_k": 3}, activation))

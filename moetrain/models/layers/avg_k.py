"""Avg-K: experts are blocks of one network, chosen by the means of their keys (arXiv:2305.13999).

An MoELayer in all else; ``router``'s options are those of ``router=topk``.

Shapes: B batch, S sequence, D model, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from moetrain.models.feed_forward import layer_options, register_feed_forward
from moetrain.models.layer_options import BlockWeight
from moetrain.models.options import ModelConfig
from moetrain.moe.context import RouterContext
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.moe.mean_key_router import MeanKeyRouter
from moetrain.moe.options import ExpertKind, ExpertsConfig, RouterConfig
from moetrain.moe.routers import full_options
from moetrain.moe.routers.topk import TopKOptions
from moetrain.ops.uses import Use


class AvgK(MoELayer):
    """``layer``: what ``MoELayer`` takes; ``options``: the router's; ``weight``: that of a chosen block.

    Where ranks share the experts, each takes the means of its own, and they exchange E D numbers a pass.
    """

    experts: Experts

    def __init__(self, options: TopKOptions, weight: BlockWeight, **layer: Any) -> None:
        super().__init__(router_options=options, **layer)
        number = self.experts.num_experts
        self.router = MeanKeyRouter(self.router.d_model, number, options, weight is BlockWeight.one)
        self.use_backend(self.experts.backend)
        _, _, columns, width = self.experts.w_gate_up_EDCF.shape
        share = self.router.top_k / number
        # a mean of F keys is one multiply-add each for a token
        self.uses = {"experts.w_gate_up_EDCF": Use(share, share + 1 / (columns * width))}

    def of_router(self, ctx: RouterContext) -> RouterContext:
        keys_ED = self.dispatcher.whole(self.experts.mean_keys())
        return replace(super().of_router(ctx), keys_ED=keys_ED)


@register_feed_forward("avg_k", on_meta=True, alike=True)
def _avg_k(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
    options = full_options(router)
    if type(options) is not TopKOptions:
        raise ValueError(f"router={router.name}: it has a router of its own, with the options of router=topk")
    if experts.kind is not ExpertKind.networks:
        raise ValueError(f"experts.kind={experts.kind.name} has no keys: set experts.kind=networks")
    common = layer_options(cfg, router, experts, layer)
    del common["router_options"]
    block = {"d_ff": cfg.d_ff_expert, "first_weights": experts.first_weights}
    return AvgK(options, cfg.avg_k.weight, **block, **common)

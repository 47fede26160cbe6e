"""MoE-X: wide ReLU experts, and a router that sends a token where most units stay zero (arXiv:2503.07639).

An MoELayer in all else; ``router``'s options are those of ``router=topk``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moetrain.models.feed_forward import layer_options, register_feed_forward
from moetrain.models.options import ModelConfig
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.moe.options import ExpertKind, ExpertsConfig, RouterConfig
from moetrain.moe.routers import full_options
from moetrain.moe.routers.topk import TopKOptions
from moetrain.moe.sparsity_router import SparsityRouter
from moetrain.ops.uses import Use


class MoEX(MoELayer):
    """``layer``: what ``MoELayer`` takes; ``options``: the router's."""

    refuses_ep = "routes by the weights of all experts"

    experts: Experts

    def __init__(self, options: TopKOptions, **layer: Any) -> None:
        super().__init__(router_options=options, **layer)
        self.router = SparsityRouter(self.router.d_model, self.experts, options)
        self.use_backend(self.experts.backend)
        number, width = self.experts.num_experts, self.experts.w_down_EFD.shape[1]
        share = self.router.top_k / number
        # a mean and a variance of F weights are one multiply-add each for a token
        self.uses = {"experts.w_gate_up_EDCF": Use(share, share + 2 / width)}


@register_feed_forward("moe_x", on_meta=True, alike=True)
def _moe_x(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
    options = full_options(router)
    if type(options) is not TopKOptions:
        raise ValueError(f"router={router.name}: it has a router of its own, with the options of router=topk")
    if experts.kind is not ExpertKind.networks:
        raise ValueError(f"experts.kind={experts.kind.name} has no units to count: set experts.kind=networks")
    if experts.activation.value not in ("relu", "relu2"):
        raise ValueError(
            f"experts.activation={experts.activation.name} leaves no unit at 0: take relu or relu2"
        )
    if experts.bias or options.logit_bias:
        key = "experts.bias" if experts.bias else "router.logit_bias"
        raise ValueError(f"{key}=true has no place among its logits, which are of matrices: set it to false")
    common = layer_options(cfg, router, experts, layer)
    del common["router_options"]
    return MoEX(options, d_ff=cfg.d_ff_expert, first_weights=experts.first_weights, **common)

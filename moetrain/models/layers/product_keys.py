"""Layers that look rows up by product keys: ``peer`` and ``pkm``.

peer  Mixture of a million experts (He 2024, arXiv:2407.04153): an expert is one neuron, an input and an
      output row; y = sum over heads and their keys of softmax(score) act(u_i . x) v_i. Heads share keys and
      experts.
pkm   Product-key memory (Lample et al. 2019, arXiv:1907.05242): a key has a value row,
      y = sum over heads and their keys of softmax(score) v_i. Heads have keys of their own and share values.

The softmax is over one head's keys.

Shapes: B batch, S sequence, T = B S tokens, D model, N experts (rows), H heads, K keys of a head, A = H K.
"""

from __future__ import annotations

from torch import Tensor, nn

from moetrain.models.feed_forward import WithoutDispatch, register_feed_forward
from moetrain.models.layer_options import ProductKeysConfig
from moetrain.models.layers.common import context_of, plain_activation, refuse_unread
from moetrain.models.options import ModelConfig
from moetrain.moe import RouterContext, RoutingRecord
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.moe.product_keys import ProductKeys
from moetrain.ops.activations import activate
from moetrain.ops.init import Normal
from moetrain.ops.rows import row_products, row_sums, row_table
from moetrain.ops.uses import Use


class Rows(nn.Module):
    """The tables; ``w_up_ND`` is None for a memory, which has values alone.

    ``looked_up`` is how many rows a token reads, counted as often as heads read one.
    """

    def __init__(self, d_model: int, num_rows: int, neurons: bool, looked_up: int) -> None:
        super().__init__()
        self.keeps_own_init = not neurons  # values start as in Lample et al.'s code
        shape, initializer = (num_rows, d_model), Normal(d_model**-0.5)
        self.w_up_ND = row_table(shape, initializer) if neurons else None
        self.w_down_ND = row_table(shape, initializer)
        share = looked_up / num_rows
        self.uses = {name: Use(min(1.0, share), share) for name in ("w_up_ND", "w_down_ND")}


class LookUp(WithoutDispatch):
    """``peer`` with an ``activation`` of its neurons, ``pkm`` without. Raises what ``ProductKeys`` does."""

    def __init__(
        self, d_model: int, num_rows: int, options: ProductKeysConfig, activation: str | None
    ) -> None:
        super().__init__()
        memory = activation is None
        self.activation = activation
        self.router = ProductKeys(
            "pkm" if memory else "peer",
            d_model,
            num_rows,
            options.heads,
            options.top_k,
            options.d_query,
            options.norm_momentum,
            own_keys=memory,
        )
        self.experts = Rows(d_model, num_rows, not memory, options.heads * options.top_k)

    def forward(self, x_BSD: Tensor, ctx: RouterContext | None = None) -> tuple[Tensor, RoutingRecord]:
        ctx = context_of(x_BSD, ctx)
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        chosen = self.router(x_TD, ctx)
        ids_TA = chosen.ids_THK.flatten(1)
        weights_TA = chosen.scores_THK.softmax(-1).flatten(1).to(x_TD.dtype)
        if self.activation is not None:
            assert self.experts.w_up_ND is not None
            hidden_TA = row_products(x_TD, self.experts.w_up_ND, ids_TA)
            weights_TA = weights_TA * activate(None, hidden_TA, self.activation)
        y_TD = row_sums(weights_TA, self.experts.w_down_ND, ids_TA)
        return y_TD.view_as(x_BSD), chosen.record


@register_feed_forward("peer", on_meta=True, alike=True)
def _peer(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
    refuse_unread(cfg, experts)
    return LookUp(cfg.d_model, cfg.num_experts, cfg.product_keys, plain_activation(experts))


@register_feed_forward("pkm", on_meta=True, alike=True)
def _pkm(cfg: ModelConfig, router: RouterConfig, experts: ExpertsConfig, layer: int) -> nn.Module:
    refuse_unread(cfg, experts)
    return LookUp(cfg.d_model, cfg.num_experts, cfg.product_keys, None)

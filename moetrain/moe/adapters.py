"""Adapters as experts around one shared network (PESC; Wu et al. 2024, arXiv:2401.02731).

Shapes: B batch, S sequence, D model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moetrain.moe.context import RouterContext
from moetrain.moe.mlp import network
from moetrain.moe.routing import Routing
from moetrain.moe.shared_network import SharedNetworkLayer


class AdapterLayer(SharedNetworkLayer):
    """y = h + sum over a token's assignments of weight * A(h), with h = network(x), routed on x.

    The network runs once a token. A(h) = down(gelu(up(h))) is of width ``d_adapter``. Raises ValueError for
    shared experts: the network is shared already.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        d_adapter: int,
        num_experts: int,
        activation: str,
        **layer: Any,
    ) -> None:
        if layer.get("num_shared_experts"):
            raise ValueError("adapters share the dense network: set model.num_shared_experts=0")
        super().__init__(d_model, d_adapter, num_experts, activation="gelu", **layer)
        self.make_network(d_model, d_ff, activation)

    def forward(
        self,
        x_BSD: Tensor,
        ctx: RouterContext | None = None,
        router_input: Tensor | None = None,
        shared_input: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        h_BSD = network(x_BSD, self, self.activation)
        seen_BSD = self.read_by_router(x_BSD, ctx) if router_input is None else router_input
        y_BSD, routing = super().forward(h_BSD, ctx, seen_BSD, shared_input)
        return h_BSD + y_BSD.to(h_BSD.dtype), routing

"""MoELayer: route, dispatch, compute, combine.

Shapes: B batch, S sequence, T = B S tokens, D model, R computed rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe.context import RouterContext
from moetrain.moe.dispatch import Dispatcher, LocalDispatcher
from moetrain.moe.experts import Experts
from moetrain.moe.mlp import MLP
from moetrain.moe.options import RouterConfig
from moetrain.moe.rounds import in_rounds, round_starts
from moetrain.moe.routers import build_router
from moetrain.moe.routing import Routing
from moetrain.moe.zero_experts import ZeroExperts
from moetrain.ops.init import Normal, parameter


@dataclass(frozen=True)
class Started:
    """A layer between routing and computing; ``x_BSD`` is what the shared experts see by default.

    Rows that are too many at once are not ``dispatched`` yet: they go by ``rounds`` when the layer finishes.
    """

    x_BSD: Tensor
    routing: Routing
    dispatched: Any  # the dispatcher's own
    rounds: list[int]


class MoELayer(nn.Module):
    """y = sum over a token's assignments of weight * expert(x), plus the shared experts of x.

    ``router`` is a key of ROUTERS; its options come as a dict or as the options dataclass. ``num_experts``
    have feed-forward networks; a router may add experts that need none. ``max_rows_per_rank``: more
    assignments than that are computed in rounds, which keep only their input for backward; None: no bound.
    ``d_ff_shared``: hidden width of all shared experts together; None: ``d_ff`` each. ``shared_gate``: their
    output is multiplied by sigmoid(x @ gate), one number a token.
    Raises ValueError for an unknown router, option, activation or backend.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        router: str = "topk",
        router_options: dict[str, Any] | RouterConfig | None = None,
        activation: str = "swiglu",
        backend: str = "auto",
        num_shared_experts: int = 0,
        d_ff_shared: int | None = None,
        shared_gate: bool = False,
        block: int | None = None,
        max_rows_per_rank: int | None = None,
    ) -> None:
        super().__init__()
        if num_shared_experts == 0 and (d_ff_shared is not None or shared_gate):
            raise ValueError("d_ff_shared and shared_gate are of shared experts, but num_shared_experts=0")
        if max_rows_per_rank is not None and max_rows_per_rank < 1:
            raise ValueError(
                f"experts.max_rows_per_rank={max_rows_per_rank} must be at least 1, or null for no bound"
            )
        self.max_rows_per_rank = max_rows_per_rank
        given = {"options": router_options} if isinstance(router_options, RouterConfig) else router_options
        self.router = build_router(router, d_model=d_model, num_experts=num_experts, **(given or {}))
        self.experts = Experts(num_experts, d_model, d_ff, activation, backend)
        shared_width = num_shared_experts * d_ff if d_ff_shared is None else d_ff_shared
        self.shared = MLP(d_model, shared_width, activation) if num_shared_experts else None
        self.shared_gate_1D = parameter((1, d_model), Normal(d_model**-0.5)) if shared_gate else None
        kinds = self.router.zero_experts
        self.zero_experts = ZeroExperts(d_model, kinds) if kinds is not None else None
        self.dispatcher: Dispatcher = LocalDispatcher(block)

    def forward(self, x_BSD: Tensor, ctx: RouterContext | None = None) -> tuple[Tensor, Routing]:
        return self.finish(self.start(x_BSD, ctx))

    def start(
        self, x_BSD: Tensor, ctx: RouterContext | None = None, router_input: Tensor | None = None
    ) -> Started:
        """Route (on ``router_input`` if given, same shape as x) and send rows on their way."""
        batch, seq, width = x_BSD.shape
        if ctx is None:
            ctx = RouterContext.default(batch, seq, x_BSD.device)
        if (ctx.batch, ctx.seq) != (batch, seq):
            raise ValueError(f"ctx is of {ctx.batch} x {ctx.seq} tokens, but x has {batch} x {seq}")
        seen = x_BSD if router_input is None else router_input
        routing: Routing = self.router(seen.reshape(-1, width), ctx)
        rounds = self._rounds(routing, batch * seq)
        if len(rounds) > 1:
            return Started(x_BSD, routing, None, rounds)
        return Started(x_BSD, routing, self.dispatcher.dispatch(x_BSD.reshape(-1, width), routing), rounds)

    def finish(self, started: Started, shared_input: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Compute and combine; returns y in the dtype of the experts' products, and the routing.

        Zero-computation and shared experts compute while rows travel.
        """
        x_BSD = started.x_BSD
        beside = partial(
            self._beside, x_BSD, started.routing, x_BSD if shared_input is None else shared_input
        )
        if started.dispatched is None:
            x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
            y_TD, others = in_rounds(x_TD, started.routing, started.rounds, self._one_round), beside()
        else:
            y_TD, others = self.dispatcher.compute(started.dispatched, self.experts, beside)
        y_BSD = y_TD.view_as(x_BSD)
        for other_BSD in others:
            y_BSD = y_BSD + other_BSD.to(y_BSD.dtype)
        return y_BSD, started.routing

    def _beside(self, x_BSD: Tensor, routing: Routing, shared_BSD: Tensor) -> list[Tensor]:
        """What is added to the dispatched experts' sum."""
        parts = [] if self.zero_experts is None else [self.zero_experts(x_BSD, routing)]
        return parts if self.shared is None else [*parts, self._shared(shared_BSD)]

    def _shared(self, x_BSD: Tensor) -> Tensor:
        assert self.shared is not None
        y_BSD: Tensor = self.shared(x_BSD)
        return (
            y_BSD if self.shared_gate_1D is None else y_BSD * F.linear(x_BSD, self.shared_gate_1D).sigmoid()
        )

    def _one_round(self, x_TD: Tensor, routing: Routing) -> Tensor:
        dispatched = self.dispatcher.dispatch(x_TD, routing)
        return self.dispatcher.compute(dispatched, self.experts, lambda: None)[0]

    def _rounds(self, routing: Routing, tokens: int) -> list[int]:
        """First tokens of the rounds, as many as the rank with the most has; one where nothing is bounded."""
        usual = self.router.usual_rows_per_token
        bounds = [self.max_rows_per_rank, None if usual is None else max(1.0, usual * tokens)]
        given = [bound for bound in bounds if bound is not None]
        if not given:
            return [0]
        starts = round_starts(routing, tokens, min(given))
        return starts + [tokens] * (self.dispatcher.agree(len(starts)) - len(starts))

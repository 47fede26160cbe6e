"""Expert parallelism: each rank holds a block of the experts, and rows travel to them and back.

Shapes: T tokens, D model, E experts overall, e experts here, P ranks of the group, n assignments to
feed-forward networks of this rank's tokens, X rows received, R computed rows, block-aligned by expert.

A rank without tokens, an expert without rows and everything on one expert are ordinary input: every rank
takes part in every exchange, with empty parts where it has nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.moe.assign import stable_order
from moetrain.moe.dispatch import Dispatched, Plan, block_of, layout
from moetrain.moe.exchange import Exchange
from moetrain.moe.routing import Routing
from moetrain.ops import gather_sum


@dataclass(frozen=True)
class _Route:
    """Who sends how many rows to whom, and which token each sent row is.

    ``tokens_n`` are sorted by (expert, token), so by receiver; ``by_token_n`` are their places grouped by
    token, ``ends_T`` closes each group.
    """

    exchange: Exchange
    sent: list[int]
    received: list[int]
    tokens_n: Tensor
    by_token_n: Tensor
    ends_T: Tensor


@dataclass(frozen=True)
class _ReturnPlan(Plan):
    route: _Route
    scale_n: Tensor | None


class AllToAllDispatcher:
    """Contiguous blocks of experts over the ranks of ``exchange``, in rank order.

    ``company``: the ranks that must make equally many rounds; None: the same.
    One host synchronisation a call: what is sent and received, from which all layouts follow. Three
    exchanges forward (counts, rows with their weights, results) and two backward.
    Raises ValueError where the group's size does not divide ``num_experts``.
    """

    def __init__(
        self,
        exchange: Exchange,
        num_experts: int,
        device: torch.device,
        block: int | None = None,
        company: dist.ProcessGroup | None = None,
    ) -> None:
        ranks = exchange.group.size()
        if num_experts % ranks:
            raise ValueError(f"{ranks} ranks do not divide {num_experts} experts")
        self.exchange, self.device, self.block = exchange, device, block
        self.company = exchange if company is None else exchange.over(company)
        self.num_local = num_experts // ranks

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        ranks = self.exchange.group.size()
        sent_Pe = routing.counts_E[: routing.num_ffn_experts].view(ranks, self.num_local).contiguous()
        received_Pe, sent, received = self.exchange.counts(sent_Pe)
        useful = [sum(row[e] for row in received) for e in range(self.num_local)]

        rows_sent = sum(map(sum, sent))
        tokens_n = routing.token_ids_N[:rows_sent]
        route = _Route(
            self.exchange,
            [sum(row) for row in sent],
            [sum(row) for row in received],
            tokens_n,
            stable_order(tokens_n, x_TD.shape[0]),
            torch.bincount(tokens_n, minlength=x_TD.shape[0]).cumsum(0),
        )
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):
            x_TD = x_TD.to(torch.get_autocast_dtype(device))  # what the experts would make of it
        source_XD, weights_X = _Send.apply(x_TD, routing.weights_N[:rows_sent], route)  # type: ignore[no-untyped-call]

        # Received rows lie by (sender, expert); experts want them by (expert, sender).
        experts_e = torch.arange(self.num_local, device=x_TD.device)
        experts_X = torch.repeat_interleave(
            experts_e.repeat(ranks), received_Pe.reshape(-1), output_size=source_XD.shape[0]
        )
        order_X = stable_order(experts_X, self.num_local)
        rows, slots_X = layout(
            order_X, received_Pe.sum(0), useful, source_XD.shape[0], block_of(x_TD, self.block)
        )
        weights_R = weights_X.new_zeros(rows.ids_R.shape[0]).scatter(0, slots_X, weights_X[order_X])
        scale_N = routing.forward_scale_N
        scale_n = None if scale_N is None else scale_N[:rows_sent]
        return Dispatched(source_XD, rows, weights_R, useful, _ReturnPlan(rows, None, route, scale_n))

    def agree(self, rounds: int) -> int:
        """One small all-reduce and a host synchronisation, for layers with a bound on rows only.

        Over all ranks that gather sharded experts together, which they do once a round.
        """
        return self.company.largest("rounds", rounds, self.device)

    def combine(self, out_RD: Tensor, plan: Plan) -> Tensor:
        """y [T, D]: each token's rows summed in expert order; tokens without rows get zeros."""
        assert isinstance(plan, _ReturnPlan)
        rows = plan.rows
        out_XD = gather_sum(out_RD, rows.by_source_N, rows.ends_X, rows.ids_R)  # one row each: a permutation
        y_TD: Tensor = _Return.apply(out_XD, plan.route, plan.scale_n)  # type: ignore[no-untyped-call]
        return y_TD


def _out(name: str, rows: Tensor, route: _Route) -> Tensor:
    """Rows, one an assignment, to the experts' ranks."""
    return route.exchange.all_to_all(name, rows, route.sent, route.received)


def _back(name: str, rows: Tensor, route: _Route) -> Tensor:
    return route.exchange.all_to_all(name, rows, route.received, route.sent)


def _sum_by_token(rows_nD: Tensor, route: _Route) -> Tensor:
    return gather_sum(rows_nD, route.by_token_n, route.ends_T, route.tokens_n)


class _Send(torch.autograd.Function):
    """Tokens and weights of assignments to their experts' ranks; gradients come back, summed by token."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_n: Tensor, route: _Route) -> tuple[Tensor, Tensor]:
        ctx.route = route
        rows_nD = x_TD.index_select(0, route.tokens_n)
        return _out("rows", rows_nD, route), _out("weights", weights_n, route)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_XD: Tensor, dweights_X: Tensor) -> tuple[Tensor, Tensor, None]:
        route = ctx.route
        dx_TD = _sum_by_token(_back("rows' gradients", drows_XD, route), route)
        return dx_TD, _back("weights' gradients", dweights_X, route), None


class _Return(torch.autograd.Function):
    """Results back to their tokens, scaled in the forward pass only, and summed."""

    @staticmethod
    def forward(ctx: Any, out_XD: Tensor, route: _Route, scale_n: Tensor | None) -> Tensor:
        ctx.route = route
        rows_nD = _back("results", out_XD, route)
        if scale_n is not None:
            rows_nD = (rows_nD * scale_n[:, None]).to(rows_nD.dtype)
        return _sum_by_token(rows_nD, route)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None, None]:
        rows_nD = dy_TD.index_select(0, ctx.route.tokens_n)
        return _out("results' gradients", rows_nD, ctx.route), None, None

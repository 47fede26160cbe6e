"""The base of dispatchers over ranks: rows in flight, chunks of experts, weights that are sent along.

Shapes: T tokens, D model, n assignments of this rank's tokens, X source rows, R computed rows, block-aligned,
E experts, e of this rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.moe.assignment import Assignment
from moetrain.moe.dispatch.base import Dispatcher, ExpertRows, Work
from moetrain.moe.dispatch.collectives import Exchange, SplitSizes
from moetrain.moe.dispatch.in_flight import (
    InFlight,
    Route,
    combine_start,
    combine_wait,
    dispatch_start,
    dispatch_wait,
)
from moetrain.moe.dispatch.placement import Placement
from moetrain.moe.dispatch.plan import Plan, sum_by_source
from moetrain.moe.dispatch.row_index import inverse


@dataclass(frozen=True)
class RemoteWork(Work):
    """The rows of all chunks, in flight. ``plans``: a plan a chunk. ``tickets`` carry the autograd graph."""

    in_flight: InFlight
    tickets: tuple[Tensor, ...]
    plans: list[Plan]

    @property
    def sizes(self) -> list[int]:
        return [plan.rows.segments.num_experts for plan in self.plans]

    def arrivals(self) -> Iterator[ExpertRows]:
        for chunk, (plan, ticket) in enumerate(zip(self.plans, self.tickets, strict=True)):
            yield ExpertRows(dispatch_wait(ticket, self.in_flight, chunk), plan.rows, plan.weights_R)

    def done(self, out_RD: Tensor, chunk: int) -> Tensor:
        return combine_start(sum_by_source(out_RD, self.plans[chunk]), self.in_flight, chunk)

    def combine(self, done: Sequence[Tensor]) -> Tensor:
        return combine_wait(done, self.in_flight)


class RemoteDispatcher(Dispatcher):
    """A dispatcher to experts that ``placement`` spreads over ranks.

    ``company``: the ranks that must make equally many rounds as this one, because they gather sharded
    experts together.
    """

    def __init__(
        self, company: Exchange, placement: Placement, device: torch.device, block: int | None = None
    ) -> None:
        super().__init__(block)
        self.company, self.placement, self.device = company, placement, device

    @property
    @abstractmethod
    def levels(self) -> tuple[Exchange, ...]:
        """Exchanges that together reach all ranks with experts: of neighbours in rank order first."""

    @abstractmethod
    def plan(self, x_TD: Tensor, by_slot: Assignment) -> tuple[Route, list[Plan]]:
        """The route of the rows, and a plan for each chunk; exchanges messages much smaller than rows.

        ``by_slot``: the assignment with the placement's slots as its experts.
        """

    def dispatch(self, x_TD: Tensor, assignment: Assignment) -> RemoteWork:
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):
            x_TD = x_TD.to(torch.get_autocast_dtype(device))  # what the experts would make of it
        route, plans = self.plan(x_TD, self.placement.by_slot(assignment))
        in_flight = InFlight(route)
        return RemoteWork(in_flight, dispatch_start(x_TD, in_flight), plans)

    def whole(self, rows_eD: Tensor) -> Tensor:
        rows_ED = rows_eD
        for exchange in self.levels:
            rows_ED = _Gathered.apply(rows_ED, exchange)  # type: ignore[no-untyped-call]
        if self.placement.is_contiguous:
            return rows_ED
        slots_E = inverse(torch.tensor(self.placement.experts))
        return rows_ED.index_select(0, slots_E.to(rows_ED.device))

    def agree(self, rounds: int) -> int:
        """As of Dispatcher: one small all-reduce and one wait. Only layers with a bound on rows call it."""
        return self.company.largest("rounds", rounds, self.device)


def pack(numbers_n: Tensor, values: list[Tensor]) -> Tensor:
    """One message, int32 [n, w]: of each assignment its number and its values, which are fp32 or fp64."""
    bits_nW = torch.stack([value.detach() for value in values], 1).view(torch.int32)
    return torch.cat([numbers_n.to(torch.int32)[:, None], bits_nW], 1)


def unpack(packed_nW: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The inverse of :func:`pack`: the numbers as int64, and the values in ``dtype``."""
    bits_nW = packed_nW[:, 1:].clone(memory_format=torch.contiguous_format)  # aligned as dtype wants it
    return packed_nW[:, 0].long(), list(bits_nW.view(dtype).unbind(1))


def with_gradient_to(
    weights_n: Tensor, received_X: Tensor, hops: list[tuple[SplitSizes, Tensor | None]]
) -> Tensor:
    """``received_X``, the received copies of ``weights_n``, with an autograd edge back to the weights.

    ``hops``: the exchanges that sent them, each with the permutation that was applied before it, or None.
    The backward pass sends gradients along the hops in reverse.
    """
    weights: Tensor = _Received.apply(weights_n, received_X, hops)  # type: ignore[no-untyped-call]
    return weights


class _Gathered(torch.autograd.Function):
    """The rows of all ranks of an exchange, in rank order; every rank has equally many."""

    @staticmethod
    def forward(ctx: Any, rows_eD: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.start_all_gather("experts' keys", rows_eD).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_ED: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.start_reduce_scatter("experts' keys' gradients", drows_ED).wait(), None


class _Received(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_n: Tensor, received_X: Tensor, hops: list[Any]) -> Tensor:
        ctx.hops = hops
        return received_X.view_as(received_X)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights_X: Tensor) -> tuple[Tensor, None, None]:
        for splits, order_n in reversed(ctx.hops):
            dweights_X = splits.back("weights' gradients", dweights_X).wait()
            if order_n is not None:
                dweights_X = torch.empty_like(dweights_X).index_copy_(0, order_n, dweights_X)
        return dweights_X, None, None

"""Rows between the tokens' ranks and the experts': away, back, and the same again with gradients.

Four autograd functions. What one launches forward another waits for, and in the backward pass the other way
round, so that a rank computes while rows travel in both. Backward runs last chunk first, on all ranks alike.

Shapes: T tokens, D model, X rows at the experts, n assignments, u rows sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.moe.assign import count, stable_order
from moetrain.moe.exchange import Flight
from moetrain.ops import gather_sum


class Route(Protocol):
    """Where the rows of one dispatch go, in ``chunks`` of experts; a value."""

    @property
    def chunks(self) -> int: ...

    def leave(self, name: str, x_TD: Tensor, chunk: int) -> Flight:
        """Tokens' rows towards the experts of a chunk."""
        ...

    def arrive(self, name: str, flight: Flight, chunk: int) -> Tensor:
        """Their rows [X, D] where the experts are."""
        ...

    def turn_back(self, name: str, rows_XD: Tensor, chunk: int) -> Flight:
        """As many rows towards their tokens."""
        ...

    def come_home(self, flights: list[Flight], scaled: bool) -> Tensor:
        """The sum [T, D] of each token's rows of all chunks, ``scaled`` if rows have a forward scale."""
        ...


class Journey:
    """The flights of a route by chunk: left here by what launches them for what waits for them.

    No dataclass: FSDP2 looks for tensors in a module's dataclasses, and puts copies in their place.
    """

    def __init__(self, route: Route) -> None:
        self.route = route
        self.away: dict[int, Flight] = {}
        self.back: dict[int, Flight] = {}


@dataclass(frozen=True)
class Picked:
    """Rows taken from source rows, ``ids_u``, and the way back; ``by_source_u`` and ``ends_X`` group them."""

    ids_u: Tensor
    by_source_u: Tensor
    ends_X: Tensor

    @staticmethod
    def of(ids_u: Tensor, num_source: int) -> Picked:
        ends_X = count(ids_u, num_source).cumsum(0)
        return Picked(ids_u, stable_order(ids_u, num_source), ends_X)

    def take(self, source_XD: Tensor) -> Tensor:
        return source_XD.index_select(0, self.ids_u)

    def total(self, rows_uD: Tensor) -> Tensor:
        """Each source row's rows summed, in the order of ``by_source_u``."""
        return gather_sum(rows_uD, self.by_source_u, self.ends_X, self.ids_u)


def send(x_TD: Tensor, journey: Journey) -> tuple[Tensor, ...]:
    """Launch all chunks; returns a ticket for each, an empty tensor that carries the autograd graph."""
    tickets: tuple[Tensor, ...] = _Send.apply(x_TD, journey)  # type: ignore[no-untyped-call]
    return tickets


def arrive(ticket: Tensor, journey: Journey, chunk: int) -> Tensor:
    """Wait for a chunk's rows [X, D]."""
    rows_XD: Tensor = _Arrive.apply(ticket, journey, chunk)  # type: ignore[no-untyped-call]
    return rows_XD


def turn_back(out_XD: Tensor, journey: Journey, chunk: int) -> Tensor:
    """Launch a chunk's results; returns a ticket."""
    ticket: Tensor = _TurnBack.apply(out_XD, journey, chunk)  # type: ignore[no-untyped-call]
    return ticket


def come_home(tickets: list[Tensor], journey: Journey) -> Tensor:
    """Wait for all results; y [T, D]."""
    y_TD: Tensor = _ComeHome.apply(journey, *tickets)  # type: ignore[no-untyped-call]
    return y_TD


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, journey: Journey) -> tuple[Tensor, ...]:
        ctx.journey = journey
        chunks = range(journey.route.chunks)
        journey.away.update((c, journey.route.leave("rows", x_TD, c)) for c in chunks)
        return tuple(x_TD.new_empty(0) for _ in chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dtickets: Tensor) -> tuple[Tensor, None]:
        journey = ctx.journey
        return journey.route.come_home(_taken(journey.back), scaled=False), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, journey: Journey, chunk: int) -> Tensor:
        ctx.journey, ctx.chunk = journey, chunk
        return journey.route.arrive("rows", journey.away.pop(chunk), chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_XD: Tensor) -> tuple[Tensor, None, None]:
        journey, chunk = ctx.journey, ctx.chunk
        journey.back[chunk] = journey.route.turn_back("rows' gradients", drows_XD, chunk)
        return drows_XD.new_empty(0), None, None


class _TurnBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_XD: Tensor, journey: Journey, chunk: int) -> Tensor:
        ctx.journey, ctx.chunk = journey, chunk
        journey.back[chunk] = journey.route.turn_back("results", out_XD, chunk)
        return out_XD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dticket: Tensor) -> tuple[Tensor, None, None]:
        journey, chunk = ctx.journey, ctx.chunk
        return journey.route.arrive("results' gradients", journey.away.pop(chunk), chunk), None, None


class _ComeHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: Journey, *tickets: Tensor) -> Tensor:
        ctx.journey = journey
        return journey.route.come_home(_taken(journey.back), scaled=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        journey = ctx.journey
        for chunk in reversed(range(journey.route.chunks)):  # as the backward pass will want them
            journey.away[chunk] = journey.route.leave("results' gradients", dy_TD, chunk)
        return None, *(dy_TD.new_empty(0) for _ in range(journey.route.chunks))


def _taken(flights: dict[int, Flight]) -> list[Flight]:
    """All, by chunk, and none is left."""
    return [flights.pop(chunk) for chunk in sorted(flights)]

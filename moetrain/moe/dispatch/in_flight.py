"""Rows in flight between the ranks of tokens and of experts: dispatch and combine, with their gradients.

There are four autograd functions. One starts a collective and another waits for it, in the forward and in the
backward pass, so that a rank computes while rows travel. The backward pass takes the last chunk first, on all
ranks alike.

Shapes: T tokens, D model, X rows at the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.moe.dispatch.collectives import PendingCollective


class Route(Protocol):
    """The way of one dispatch's rows to the experts and back, in ``chunks`` chunks of experts."""

    @property
    def chunks(self) -> int: ...

    def dispatch_start(self, name: str, x_TD: Tensor, chunk: int) -> PendingCollective:
        """Start to send the tokens' rows to the experts of ``chunk``. ``name``: for the observer."""
        ...

    def dispatch_wait(self, name: str, pending: PendingCollective, chunk: int) -> Tensor:
        """Wait for the rows [X, D] that arrive for this rank's experts."""
        ...

    def combine_start(self, name: str, rows_XD: Tensor, chunk: int) -> PendingCollective:
        """Start to return the chunk's rows [X, D] to their tokens."""
        ...

    def combine_wait(self, pending: list[PendingCollective], with_scale: bool) -> Tensor:
        """Wait for all chunks; each token's rows summed, [T, D]. ``with_scale``: times the forward scale."""
        ...


class InFlight:
    """The collectives of a route that have started and not finished, by chunk.

    No dataclass: FSDP2 looks for tensors in a module's dataclasses, and puts copies in their place.
    """

    def __init__(self, route: Route) -> None:
        self.route = route
        self.dispatching: dict[int, PendingCollective] = {}
        self.combining: dict[int, PendingCollective] = {}


def dispatch_start(x_TD: Tensor, in_flight: InFlight) -> tuple[Tensor, ...]:
    """Start all chunks; returns a ticket for each, an empty tensor that carries the autograd graph."""
    tickets: tuple[Tensor, ...] = _DispatchStart.apply(x_TD, in_flight)  # type: ignore[no-untyped-call]
    return tickets


def dispatch_wait(ticket: Tensor, in_flight: InFlight, chunk: int) -> Tensor:
    """Wait for a chunk's rows [X, D]."""
    rows_XD: Tensor = _DispatchWait.apply(ticket, in_flight, chunk)  # type: ignore[no-untyped-call]
    return rows_XD


def combine_start(out_XD: Tensor, in_flight: InFlight, chunk: int) -> Tensor:
    """Start to return a chunk's results; returns a ticket."""
    ticket: Tensor = _CombineStart.apply(out_XD, in_flight, chunk)  # type: ignore[no-untyped-call]
    return ticket


def combine_wait(tickets: Sequence[Tensor], in_flight: InFlight) -> Tensor:
    """Wait for all results; y [T, D]."""
    y_TD: Tensor = _CombineWait.apply(in_flight, *tickets)  # type: ignore[no-untyped-call]
    return y_TD


class _DispatchStart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, in_flight: InFlight) -> tuple[Tensor, ...]:
        ctx.in_flight = in_flight
        chunks = range(in_flight.route.chunks)
        in_flight.dispatching.update((c, in_flight.route.dispatch_start("rows", x_TD, c)) for c in chunks)
        return tuple(x_TD.new_empty(0) for _ in chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dtickets: Tensor) -> tuple[Tensor, None]:
        in_flight = ctx.in_flight
        return in_flight.route.combine_wait(_taken(in_flight.combining), with_scale=False), None


class _DispatchWait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, in_flight: InFlight, chunk: int) -> Tensor:
        ctx.in_flight, ctx.chunk = in_flight, chunk
        return in_flight.route.dispatch_wait("rows", in_flight.dispatching.pop(chunk), chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_XD: Tensor) -> tuple[Tensor, None, None]:
        in_flight, chunk = ctx.in_flight, ctx.chunk
        in_flight.combining[chunk] = in_flight.route.combine_start("rows' gradients", drows_XD, chunk)
        return drows_XD.new_empty(0), None, None


class _CombineStart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_XD: Tensor, in_flight: InFlight, chunk: int) -> Tensor:
        ctx.in_flight, ctx.chunk = in_flight, chunk
        in_flight.combining[chunk] = in_flight.route.combine_start("results", out_XD, chunk)
        return out_XD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dticket: Tensor) -> tuple[Tensor, None, None]:
        in_flight, chunk = ctx.in_flight, ctx.chunk
        pending = in_flight.dispatching.pop(chunk)
        return in_flight.route.dispatch_wait("results' gradients", pending, chunk), None, None


class _CombineWait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, in_flight: InFlight, *tickets: Tensor) -> Tensor:
        ctx.in_flight = in_flight
        return in_flight.route.combine_wait(_taken(in_flight.combining), with_scale=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        in_flight = ctx.in_flight
        route = in_flight.route
        for chunk in reversed(range(route.chunks)):  # as the backward pass will want them
            in_flight.dispatching[chunk] = route.dispatch_start("results' gradients", dy_TD, chunk)
        return None, *(dy_TD.new_empty(0) for _ in range(route.chunks))


def _taken(pending: dict[int, PendingCollective]) -> list[PendingCollective]:
    """All, by chunk, and none is left."""
    return [pending.pop(chunk) for chunk in sorted(pending)]

"""What all dispatchers over ranks share: rows leave, others compute meanwhile, chunks of experts compute.

Shapes: T tokens, D model, n assignments of this rank's tokens, X source rows, R computed rows, block-aligned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.moe.dispatch import Compute, Dispatched, Plan, sum_by_source
from moetrain.moe.exchange import Exchange, Link
from moetrain.moe.journey import Journey, Route, arrive, come_home, send, turn_back
from moetrain.moe.routing import Routing

B = TypeVar("B")


@dataclass(frozen=True)
class Placed:
    """The rows that a chunk of this rank's experts computes, which are still to arrive."""

    plan: Plan
    weights_R: Tensor


@dataclass(frozen=True)
class Sent:
    journey: Journey
    tickets: tuple[Tensor, ...]
    chunks: list[Placed]

    @property
    def sizes(self) -> list[int]:
        """Experts of each chunk."""
        return [len(chunk.plan.rows.useful) for chunk in self.chunks]

    def arrivals(self) -> Iterator[Dispatched]:
        for c, (placed, ticket) in enumerate(zip(self.chunks, self.tickets, strict=True)):
            rows = placed.plan.rows
            source_XD = arrive(ticket, self.journey, c)
            yield Dispatched(source_XD, rows, placed.weights_R, list(rows.useful), placed.plan)

    def give_back(self, out_RD: Tensor, chunk: int) -> Tensor:
        return turn_back(sum_by_source(out_RD, self.chunks[chunk].plan), self.journey, chunk)


class RemoteDispatcher(ABC):
    """``num_local`` experts are on this rank. ``company``: the ranks that must make equally many rounds."""

    def __init__(self, company: Exchange, num_local: int, device: torch.device, block: int | None) -> None:
        self.company, self.num_local, self.device, self.block = company, num_local, device, block

    @abstractmethod
    def plan(self, x_TD: Tensor, routing: Routing) -> tuple[Route, list[Placed]]:
        """Agree with the other ranks on what goes where, by messages much smaller than rows."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Sent:
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):
            x_TD = x_TD.to(torch.get_autocast_dtype(device))  # what the experts would make of it
        route, chunks = self.plan(x_TD, routing)
        journey = Journey(route)
        return Sent(journey, send(x_TD, journey), chunks)

    def compute(self, dispatched: Sent, experts: Compute, meanwhile: Callable[[], B]) -> tuple[Tensor, B]:
        beside = meanwhile()
        return come_home(experts(dispatched), dispatched.journey), beside

    def agree(self, rounds: int) -> int:
        """One small all-reduce and a host synchronisation, for layers with a bound on rows only.

        Over all ranks that gather sharded experts together, which they do once a round.
        """
        return self.company.largest("rounds", rounds, self.device)


def pack(numbers_n: Tensor, values: list[Tensor]) -> Tensor:
    """int32 [n, w]: of each assignment a row's number and fp32 or fp64 values, for one message."""
    bits_nW = torch.stack([value.detach() for value in values], 1).view(torch.int32)
    return torch.cat([numbers_n.to(torch.int32)[:, None], bits_nW], 1)


def unpack(packed_nW: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """What :func:`pack` was given: the numbers as int64, and values of ``dtype``."""
    bits_nW = packed_nW[:, 1:].clone(memory_format=torch.contiguous_format)  # aligned as dtype wants it
    return packed_nW[:, 0].long(), list(bits_nW.view(dtype).unbind(1))


def travelled(weights_n: Tensor, weights_X: Tensor, links: list[tuple[Link, Tensor | None]]) -> Tensor:
    """``weights_X``, to which ``weights_n`` became on the way, so that gradients find back.

    The way: of each link the order in which its rows left, None where it was theirs.
    """
    weights: Tensor = _Travelled.apply(weights_n, weights_X, links)  # type: ignore[no-untyped-call]
    return weights


class _Travelled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_n: Tensor, weights_X: Tensor, links: list[Any]) -> Tensor:
        ctx.links = links
        return weights_X.view_as(weights_X)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights_X: Tensor) -> tuple[Tensor, None, None]:
        for link, order_n in reversed(ctx.links):
            dweights_X = link.back("weights' gradients", dweights_X).wait()
            if order_n is not None:
                dweights_X = torch.empty_like(dweights_X).index_copy_(0, order_n, dweights_X)
        return dweights_X, None, None

"""Expert parallelism: each rank holds a block of the experts, and rows travel to them and back.

Shapes: T tokens, D model, E experts overall, e experts here, P ranks of the group, n assignments to
feed-forward networks of this rank's tokens, X rows received, c one of C chunks of the experts here.

A rank without tokens, an expert without rows and everything on one expert are ordinary input: every rank
takes part in every exchange, with empty parts where it has nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.assign import stable_order
from moetrain.moe.dispatch import block_of, place
from moetrain.moe.exchange import Exchange, Flight, Link
from moetrain.moe.journey import Picked
from moetrain.moe.remote import Placed, RemoteDispatcher, travelled
from moetrain.moe.routing import Routing
from moetrain.ops.transfer import to_device


@dataclass(frozen=True)
class _Direct:
    """One row an assignment, by (chunk, rank, expert, token); ``links`` are of the chunks."""

    links: list[Link]
    picked: Picked
    scale_n: Tensor | None

    @property
    def chunks(self) -> int:
        return len(self.links)

    def leave(self, name: str, x_TD: Tensor, chunk: int) -> Flight:
        first = sum(sum(link.sent) for link in self.links[:chunk])
        link = self.links[chunk]
        ids_n = self.picked.ids_u.narrow(0, first, sum(link.sent))
        return link.out(name, x_TD.index_select(0, ids_n))

    def arrive(self, name: str, flight: Flight, chunk: int) -> Tensor:
        return flight.wait()

    def turn_back(self, name: str, rows_XD: Tensor, chunk: int) -> Flight:
        return self.links[chunk].back(name, rows_XD)

    def come_home(self, flights: list[Flight], scaled: bool) -> Tensor:
        rows_nD = joined([flight.wait() for flight in flights])
        return self.picked.total(scale(rows_nD, self.scale_n if scaled else None))


class AllToAllDispatcher(RemoteDispatcher):
    """Contiguous blocks of experts over the ranks of ``exchange``, in rank order; one row an assignment.

    ``company``: the ranks that must make equally many rounds; None: the same. ``overlap``: rows go in that
    many chunks of whole experts, each computed while the next travels. The result does not depend on it, bit
    for bit: every product is of one expert's rows, all of them in the same order, and sums are made once, at
    the token, when all rows are back. Chunks of tokens would split the sums of the weights' gradients.

    One host synchronisation a call: what is sent and received, from which all layouts follow. Four
    exchanges forward (counts, weights, rows, results), three backward; those of rows once a chunk.
    Raises ValueError where the group's size does not divide ``num_experts``, or ``overlap`` is no number of
    chunks of this rank's.
    """

    def __init__(
        self,
        exchange: Exchange,
        num_experts: int,
        device: torch.device,
        block: int | None = None,
        company: dist.ProcessGroup | None = None,
        overlap: int = 1,
    ) -> None:
        num_local = experts_per_rank(num_experts, exchange.size)
        if not 1 <= overlap <= num_local:
            raise ValueError(f"overlap={overlap}, but there are {num_local} experts a rank")
        super().__init__(exchange.over(company or exchange.group), num_local, device, block)
        self.exchange, self.overlap = exchange, overlap

    def plan(self, x_TD: Tensor, routing: Routing) -> tuple[_Direct, list[Placed]]:
        sent_Pe = routing.counts_E[: routing.num_ffn_experts].view(-1, self.num_local).contiguous()
        received_Pe, *counts = self.exchange.counts(sent_Pe)
        links = [self._link(counts, span) for span in self._spans()]

        size = sum(map(sum, counts[0]))
        chunk_e = self._chunk_of_each(x_TD.device)
        tokens_n = routing.token_ids_N[:size]
        scale_n = None if routing.forward_scale_N is None else routing.forward_scale_N[:size]
        route = _Direct(links, Picked.of(tokens_n, x_TD.shape[0]), scale_n)
        if self.overlap > 1:
            chunk_n = chunk_e[routing.expert_ids_N()[:size] % self.num_local]
            route = _reordered(route, stable_order(chunk_n, self.overlap))

        link = self._link(counts, slice(0, self.num_local))
        weights_n = routing.weights_N[:size]
        weights_X = link.out("weights", weights_n.detach()).wait()
        weights_X = travelled(weights_n, weights_X, [(link, None)])
        block = block_of(x_TD, self.block)
        useful = [sum(column) for column in zip(*counts[1], strict=True)]
        return route, self._placed(received_Pe, useful, weights_X, chunk_e, block)

    def _placed(
        self, received_Pe: Tensor, useful: list[int], weights_X: Tensor, chunk_e: Tensor, block: int
    ) -> list[Placed]:
        """Assignments come by (sender, expert), a chunk's rows likewise; experts want (expert, sender)."""
        experts_e = torch.arange(self.num_local, device=weights_X.device)
        experts_X = torch.repeat_interleave(
            experts_e.repeat(len(received_Pe)), received_Pe.reshape(-1), output_size=weights_X.shape[0]
        )
        order_X = stable_order(experts_X, self.num_local)
        places_X = inverse(stable_order(chunk_e[experts_X], self.overlap))[order_X]
        counts_e = received_Pe.sum(0)
        chunks, first = [], 0
        for span in self._spans():
            size = sum(useful[span])
            here = slice(first, first + size)
            sources_n, weights_n = places_X[here] - first, weights_X[order_X[here]]
            plan, weights_R = place(sources_n, weights_n, None, counts_e[span], useful[span], size, block)
            chunks.append(Placed(plan, weights_R))
            first += size
        return chunks

    def _link(self, counts: list[list[list[int]]], span: slice) -> Link:
        sent, received = ([sum(row[span]) for row in rows] for rows in counts)
        return Link(self.exchange, sent, received)

    def _spans(self) -> list[slice]:
        ends = [chunk * self.num_local // self.overlap for chunk in range(self.overlap + 1)]
        return [slice(first, last) for first, last in pairwise(ends)]

    def _chunk_of_each(self, device: torch.device) -> Tensor:
        chunks = [chunk for chunk, span in enumerate(self._spans()) for _ in range(span.start, span.stop)]
        return to_device(torch.tensor(chunks), device)


def experts_per_rank(num_experts: int, ranks: int) -> int:
    """Raises ValueError where it is no whole number."""
    if num_experts % ranks:
        raise ValueError(f"{ranks} ranks do not divide {num_experts} experts")
    return num_experts // ranks


def inverse(order_n: Tensor) -> Tensor:
    """The place of each element in a permutation."""
    return torch.empty_like(order_n).scatter_(0, order_n, torch.arange(len(order_n), device=order_n.device))


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scale(rows_nD: Tensor, scale_n: Tensor | None) -> Tensor:
    """Rows times their forward scale, in their own dtype."""
    return rows_nD if scale_n is None else (rows_nD * scale_n[:, None]).to(rows_nD.dtype)


def _reordered(route: _Direct, order_n: Tensor) -> _Direct:
    """The same rows, which go in ``order_n``; a token's are summed by expert all the same."""
    was, scale_n = route.picked, route.scale_n
    picked = Picked(was.ids_u[order_n], inverse(order_n)[was.by_source_u], was.ends_X)
    return _Direct(route.links, picked, None if scale_n is None else scale_n[order_n])

"""Expert parallelism: each rank holds some of the experts, and rows travel to them and back.

Shapes: T tokens, D model, e experts here, P ranks of the group, n assignments to feed-forward networks of
this rank's tokens, X rows received, c one of C chunks of the experts here.

A rank without tokens, an expert without rows and everything on one expert are ordinary input: every rank
takes part in every exchange, with empty parts where it has nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.assign import stable_order
from moetrain.moe.assignment import Assignment
from moetrain.moe.dispatch.collectives import Exchange, PendingCollective, SplitSizes
from moetrain.moe.dispatch.placement import Placement
from moetrain.moe.dispatch.plan import Plan, place
from moetrain.moe.dispatch.remote import RemoteDispatcher, with_gradient_to
from moetrain.moe.dispatch.row_index import RowIndex, inverse, joined, scaled
from moetrain.ops.transfer import to_device


@dataclass(frozen=True)
class _Direct:
    """One row an assignment, by (chunk, rank, expert, token); ``splits`` are of the chunks."""

    splits: list[SplitSizes]
    index: RowIndex
    scale_n: Tensor | None

    @property
    def chunks(self) -> int:
        return len(self.splits)

    def dispatch_start(self, name: str, x_TD: Tensor, chunk: int) -> PendingCollective:
        first = sum(sum(splits.sent) for splits in self.splits[:chunk])
        splits = self.splits[chunk]
        ids_n = self.index.ids_u.narrow(0, first, sum(splits.sent))
        return splits.out(name, x_TD.index_select(0, ids_n))

    def dispatch_wait(self, name: str, pending: PendingCollective, chunk: int) -> Tensor:
        return pending.wait()

    def combine_start(self, name: str, rows_XD: Tensor, chunk: int) -> PendingCollective:
        return self.splits[chunk].back(name, rows_XD)

    def combine_wait(self, pending: list[PendingCollective], with_scale: bool) -> Tensor:
        rows_nD = joined([collective.wait() for collective in pending])
        return self.index.total(scaled(rows_nD, self.scale_n if with_scale else None))


class AllToAllDispatcher(RemoteDispatcher):
    """One row an assignment, straight to the rank of its expert.

    ``company``: the ranks that must make equally many rounds; None: those of ``exchange``. ``overlap``: rows
    go in that many chunks of whole experts, each computed while the next travels. The result does not depend
    on it, bit for bit: every product is of one expert's rows, all of them in the same order, and sums are
    made once, at the token, when all rows are back. Chunks of tokens would split the sums of the weights'
    gradients.

    One host synchronisation a call: what is sent and received, from which all layouts follow. Four
    exchanges forward (counts, weights, rows, results), three backward; those of rows once a chunk.
    Raises ValueError where ``overlap`` is no number of chunks of this rank's experts.
    """

    def __init__(
        self,
        exchange: Exchange,
        placement: Placement,
        device: torch.device,
        block: int | None = None,
        company: dist.ProcessGroup | None = None,
        overlap: int = 1,
    ) -> None:
        if not 1 <= overlap <= placement.per_rank:
            raise ValueError(f"overlap={overlap}, but there are {placement.per_rank} experts a rank")
        super().__init__(exchange.over(company or exchange.group), placement, device, block)
        self.exchange, self.overlap = exchange, overlap

    @property
    def levels(self) -> tuple[Exchange, ...]:
        return (self.exchange,)

    def plan(self, x_TD: Tensor, by_slot: Assignment) -> tuple[_Direct, list[Plan]]:
        num_local = self.placement.per_rank
        received_Pe, *counts = self.exchange.counts(self.placement.counts_Pe(by_slot))
        leaving = by_slot.to_ffn(sum(map(sum, counts[0])))
        chunk_e = self._chunk_of_each(x_TD.device)
        splits = [self._splits(counts, span) for span in self._spans()]
        index = RowIndex.of(leaving.token_ids_N, x_TD.shape[0], self.backend)
        route = _Direct(splits, index, leaving.forward_scale_N)
        if self.overlap > 1:
            chunk_n = chunk_e[leaving.expert_ids_N() % num_local]
            route = _reordered(route, stable_order(chunk_n, self.overlap))

        whole = self._splits(counts, slice(0, num_local))
        weights_X = whole.out("weights", leaving.weights_N.detach()).wait()
        weights_X = with_gradient_to(leaving.weights_N, weights_X, [(whole, None)])
        useful = [sum(column) for column in zip(*counts[1], strict=True)]
        block = self.block_of(x_TD, by_slot, self.placement.per_rank)
        return route, self._plans(received_Pe, useful, weights_X, chunk_e, block)

    def _plans(
        self, received_Pe: Tensor, useful: list[int], weights_X: Tensor, chunk_e: Tensor, block: int
    ) -> list[Plan]:
        """Assignments come by (sender, expert), a chunk's rows likewise; experts want (expert, sender)."""
        experts_e = torch.arange(self.placement.per_rank, device=weights_X.device)
        experts_X = torch.repeat_interleave(
            experts_e.repeat(len(received_Pe)), received_Pe.reshape(-1), output_size=weights_X.shape[0]
        )
        order_X = stable_order(experts_X, self.placement.per_rank)
        places_X = inverse(stable_order(chunk_e[experts_X], self.overlap))[order_X]
        counts_e = received_Pe.sum(0)
        plans, first = [], 0
        for span in self._spans():
            size = sum(useful[span])
            rows = slice(first, first + size)
            here = Assignment(places_X[rows] - first, weights_X[order_X[rows]], counts_e[span])
            plans.append(place(here, useful[span], size, block, self.backend))
            first += size
        return plans

    def _splits(self, counts: list[list[list[int]]], span: slice) -> SplitSizes:
        sent, received = ([sum(row[span]) for row in rows] for rows in counts)
        return SplitSizes(self.exchange, sent, received)

    def _spans(self) -> list[slice]:
        ends = [chunk * self.placement.per_rank // self.overlap for chunk in range(self.overlap + 1)]
        return [slice(first, last) for first, last in pairwise(ends)]

    def _chunk_of_each(self, device: torch.device) -> Tensor:
        chunks = [chunk for chunk, span in enumerate(self._spans()) for _ in range(span.start, span.stop)]
        return to_device(torch.tensor(chunks), device)


def _reordered(route: _Direct, order_n: Tensor) -> _Direct:
    """The same rows, which go in ``order_n``; a token's are summed by expert all the same."""
    was, scale_n = route.index, route.scale_n
    index = replace(was, ids_u=was.ids_u[order_n], by_source_u=inverse(order_n)[was.by_source_u])
    return _Direct(route.splits, index, None if scale_n is None else scale_n[order_n])

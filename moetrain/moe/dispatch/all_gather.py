"""Expert parallelism for small groups: every rank sees all tokens, and a reduce-scatter sums results.

Shapes: T tokens, D model, e experts here, P ranks of the group, n assignments of this rank's tokens, x
assignments that arrive; all ranks pad to the tokens of the rank with the most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.assign import stable_order
from moetrain.moe.assignment import Assignment
from moetrain.moe.dispatch.collectives import Exchange, PendingCollective, SplitSizes
from moetrain.moe.dispatch.placement import Placement
from moetrain.moe.dispatch.plan import Plan, place
from moetrain.moe.dispatch.remote import RemoteDispatcher, pack, unpack, with_gradient_to


@dataclass(frozen=True)
class _Everywhere:
    exchange: Exchange
    num_tokens: int
    most: int
    chunks: int = 1

    def dispatch_start(self, name: str, x_TD: Tensor, chunk: int) -> PendingCollective:
        missing = self.most - self.num_tokens
        return self.exchange.start_all_gather(name, F.pad(x_TD, (0, 0, 0, missing)) if missing else x_TD)

    def dispatch_wait(self, name: str, pending: PendingCollective, chunk: int) -> Tensor:
        return pending.wait()

    def combine_start(self, name: str, rows_XD: Tensor, chunk: int) -> PendingCollective:
        return self.exchange.start_reduce_scatter(name, rows_XD)

    def combine_wait(self, pending: list[PendingCollective], with_scale: bool) -> Tensor:
        return pending[0].wait()[: self.num_tokens]


class AllGatherDispatcher(RemoteDispatcher):
    """Each rank of ``exchange`` gets every token once and computes its own experts.

    A rank sums what its own experts make of a token; the ranks' sums are added up by the collective, in an
    order that the size of the group and of the message fix. One host synchronisation a call. Four
    exchanges forward (counts, assignments, rows, results) and three backward.
    """

    def __init__(
        self,
        exchange: Exchange,
        placement: Placement,
        device: torch.device,
        block: int | None = None,
        company: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(exchange.over(company or exchange.group), placement, device, block)
        self.exchange = exchange

    @property
    def levels(self) -> tuple[Exchange, ...]:
        return (self.exchange,)

    def plan(self, x_TD: Tensor, by_slot: Assignment) -> tuple[_Everywhere, list[Plan]]:
        sent_Pe = self.placement.counts_Pe(by_slot)
        tokens_P1 = sent_Pe.new_full((self.exchange.size, 1), x_TD.shape[0])
        received_PC, *counts = self.exchange.counts(torch.cat([tokens_P1, sent_Pe], 1))
        sent, received = ([row[1:] for row in rows] for rows in counts)
        splits = SplitSizes(self.exchange, [sum(row) for row in sent], [sum(row) for row in received])
        most = max(row[0] for row in counts[1])

        leaving = by_slot.to_ffn(sum(splits.sent))
        weights_n, scale_n = leaving.weights_N, leaving.forward_scale_N
        values = [weights_n] if scale_n is None else [weights_n, scale_n]
        arrived_xW = splits.out("assignments", pack(leaving.token_ids_N, values)).wait()
        tokens_x, (weights_x, *scales) = unpack(arrived_xW, weights_n.dtype)
        weights_x = with_gradient_to(weights_n, weights_x, [(splits, None)])

        # Assignments come by (sender, expert); experts want (expert, sender).
        counts_Pe, num_local = received_PC[:, 1:], self.placement.per_rank
        first_P = most * torch.arange(self.exchange.size, device=tokens_x.device)
        cells = torch.arange(counts_Pe.numel(), device=tokens_x.device)
        cell_x = torch.repeat_interleave(cells, counts_Pe.reshape(-1), output_size=len(tokens_x))
        order_x = stable_order(cell_x % num_local, num_local)
        sources_x = (tokens_x + first_P[cell_x // num_local])[order_x]
        scale_x = scales[0][order_x] if scales else None
        here = Assignment(sources_x, weights_x[order_x], counts_Pe.sum(0), scale_x)
        useful = [sum(column) for column in zip(*received, strict=True)]
        num_source, block = most * self.exchange.size, self.block_of(x_TD, by_slot, self.placement.per_rank)
        plan = place(here, useful, num_source, block, self.backend)
        return _Everywhere(self.exchange, x_TD.shape[0], most), [plan]

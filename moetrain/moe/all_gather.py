"""Expert parallelism for small groups: every rank sees all tokens, and a reduce-scatter sums results.

Shapes: T tokens, D model, e experts here, P ranks of the group, n assignments of this rank's tokens, x
assignments that arrive, S tokens of the rank with the most: all ranks pad to as many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.all_to_all import experts_per_rank
from moetrain.moe.assign import stable_order
from moetrain.moe.dispatch import block_of, place
from moetrain.moe.exchange import Exchange, Flight, Link
from moetrain.moe.remote import Placed, RemoteDispatcher, pack, travelled, unpack
from moetrain.moe.routing import Routing


@dataclass(frozen=True)
class _Everywhere:
    exchange: Exchange
    num_tokens: int
    most: int
    chunks: int = 1

    def leave(self, name: str, x_TD: Tensor, chunk: int) -> Flight:
        missing = self.most - self.num_tokens
        return self.exchange.start_all_gather(name, F.pad(x_TD, (0, 0, 0, missing)) if missing else x_TD)

    def arrive(self, name: str, flight: Flight, chunk: int) -> Tensor:
        return flight.wait()

    def turn_back(self, name: str, rows_XD: Tensor, chunk: int) -> Flight:
        return self.exchange.start_reduce_scatter(name, rows_XD)

    def come_home(self, flights: list[Flight], scaled: bool) -> Tensor:
        return flights[0].wait()[: self.num_tokens]


class AllGatherDispatcher(RemoteDispatcher):
    """Contiguous blocks of experts over the ranks of ``exchange``, in rank order; each gets every token once.

    A rank sums what its own experts make of a token; the ranks' sums are added up by the collective, in an
    order that the size of the group and of the message fix. One host synchronisation a call. Four
    exchanges forward (counts, assignments, rows, results) and three backward.
    """

    def __init__(
        self,
        exchange: Exchange,
        num_experts: int,
        device: torch.device,
        block: int | None = None,
        company: dist.ProcessGroup | None = None,
    ) -> None:
        num_local = experts_per_rank(num_experts, exchange.size)
        super().__init__(exchange.over(company or exchange.group), num_local, device, block)
        self.exchange = exchange

    def plan(self, x_TD: Tensor, routing: Routing) -> tuple[_Everywhere, list[Placed]]:
        sent_Pe = routing.counts_E[: routing.num_ffn_experts].view(-1, self.num_local)
        tokens_P1 = sent_Pe.new_full((self.exchange.size, 1), x_TD.shape[0])
        received_PC, *counts = self.exchange.counts(torch.cat([tokens_P1, sent_Pe], 1))
        sent, received = ([row[1:] for row in rows] for rows in counts)
        link = Link(self.exchange, [sum(row) for row in sent], [sum(row) for row in received])
        most = max(row[0] for row in counts[1])

        size = sum(link.sent)
        weights_n, scale_n = routing.weights_N[:size], routing.forward_scale_N
        values = [weights_n] if scale_n is None else [weights_n, scale_n[:size]]
        arrived_xW = link.out("assignments", pack(routing.token_ids_N[:size], values)).wait()
        tokens_x, (weights_x, *scales) = unpack(arrived_xW, weights_n.dtype)
        weights_x = travelled(weights_n, weights_x, [(link, None)])

        # Assignments come by (sender, expert); experts want (expert, sender).
        counts_Pe = received_PC[:, 1:]
        first_P = most * torch.arange(self.exchange.size, device=tokens_x.device)
        cells = torch.arange(counts_Pe.numel(), device=tokens_x.device)
        cell_x = torch.repeat_interleave(cells, counts_Pe.reshape(-1), output_size=len(tokens_x))
        order_x = stable_order(cell_x % self.num_local, self.num_local)
        sources_x = (tokens_x + first_P[cell_x // self.num_local])[order_x]
        plan, weights_R = place(
            sources_x, weights_x[order_x], scales[0][order_x] if scales else None, counts_Pe.sum(0),
            [sum(column) for column in zip(*received, strict=True)], most * self.exchange.size,
            block_of(x_TD, self.block),
        )  # fmt: skip
        return _Everywhere(self.exchange, x_TD.shape[0], most), [Placed(plan, weights_R)]

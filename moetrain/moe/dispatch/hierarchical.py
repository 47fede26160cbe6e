"""Expert parallelism over two levels: a token's row goes once to each node, and is spread inside it.

First from node to node, between the ranks of one place in their nodes, then inside the node. In this order a
row crosses once and is multiplied by the faster links; the other way round, a node would first have to gather
on one rank all that it sends to another. All that a rank has for a node is one message.

Shapes: T tokens, D model, M nodes, L ranks of a node, P = M L ranks, e experts here, n assignments of this
rank's tokens, u distinct (node, token) pairs of them; m and v: those that arrive from other nodes for this
one, and their distinct (rank, row) pairs; x and X: assignments and rows that arrive for this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.assign import stable_order
from moetrain.moe.assignment import Assignment
from moetrain.moe.dispatch.collectives import Exchange, SplitSizes
from moetrain.moe.dispatch.placement import Placement
from moetrain.moe.dispatch.plan import Plan, place
from moetrain.moe.dispatch.remote import RemoteDispatcher, pack, unpack, with_gradient_to
from moetrain.moe.dispatch.row_index import RowIndex
from moetrain.moe.dispatch.two_levels import Level, Summed, Unsummed


@dataclass(frozen=True)
class _Counts:
    """Rows (column 0) and assignments of each expert (the others) that come for this node and this rank."""

    near_rows_M: Tensor  # distinct rows from each node
    near_MLC: Tensor
    far_LMC: Tensor
    useful: list[int]  # rows of each expert here
    nodes: tuple[SplitSizes, SplitSizes]  # of distinct rows, of one row an assignment
    node: tuple[SplitSizes, SplitSizes]


class HierarchicalDispatcher(RemoteDispatcher):
    """``nodes``: the ranks of this place in every node; ``node``: the ranks of this node, both in rank order;
    ``company``: the ranks that must make equally many rounds, those of all these nodes at least.

    The placement's ranks are all of these, node by node. ``node_sums``: results and gradients of a
    token are summed in the node before they go back; False: they go back one row an assignment, are summed as
    :class:`AllToAllDispatcher` does, and the layer's result is its, bit for bit: rows are computed in the
    same order. One node, or nodes of one rank, are ordinary input: that level then sends to itself.

    One host synchronisation a call. Eight exchanges forward (counts, assignments, rows, results, each on two
    levels), six backward; only the exchange of rows between nodes travels while others compute.
    """

    def __init__(
        self,
        nodes: Exchange,
        node: Exchange,
        company: dist.ProcessGroup,
        placement: Placement,
        device: torch.device,
        block: int | None = None,
        node_sums: bool = True,
    ) -> None:
        super().__init__(nodes.over(company), placement, device, block)
        self.nodes, self.node, self.node_sums = nodes, node, node_sums

    @property
    def levels(self) -> tuple[Exchange, ...]:
        return self.node, self.nodes

    def plan(self, x_TD: Tensor, by_slot: Assignment) -> tuple[Summed | Unsummed, list[Plan]]:
        here_PT = self._destinations(x_TD.shape[0], by_slot)
        counts = self._exchange_counts(here_PT, by_slot)
        leaving = by_slot.to_ffn(sum(counts.nodes[1].sent))
        tokens_n, weights_n, scale_n = leaving.token_ids_N, leaving.weights_N, leaving.forward_scale_N
        values = [weights_n] if scale_n is None or not self.node_sums else [weights_n, scale_n]

        node_n = self.placement.rank_of(leaving.expert_ids_N()) // self.node.size
        here_MT = here_PT.unflatten(0, (self.nodes.size, self.node.size)).any(1)
        index_u, numbers_n = _distinct(here_MT, node_n, tokens_n, sum(counts.nodes[0].sent), self.backend)
        arrived_mW = counts.nodes[1].out("assignments", pack(numbers_n, values)).wait()
        spread, leaving_mW = self._spread(counts, arrived_mW)
        arrived_xW = counts.node[1].out("assignments", leaving_mW).wait()

        numbers_x, (weights_x, *scales) = unpack(arrived_xW, weights_n.dtype)
        far_L = counts.far_LMC[..., 1:].sum((1, 2))
        rows_x = numbers_x + _starts(counts.far_LMC[..., 0].sum(1), far_L, len(numbers_x))
        hops = [(counts.nodes[1], None), (spread.each, spread.order_n)]
        weights_x = with_gradient_to(weights_n, weights_x, hops)
        block = self.block_of(x_TD, by_slot, self.placement.per_rank)
        plan = self._plan(counts, rows_x, weights_x, scales, block)
        level = Level(*counts.nodes, index_u)
        if self.node_sums:
            return Summed(level, spread), [plan]
        home = RowIndex.of(tokens_n, x_TD.shape[0], self.backend)
        return Unsummed(level, spread, rows_x, home, scale_n), [plan]

    def _destinations(self, tokens: int, by_slot: Assignment) -> Tensor:
        """bool [P, T]: whether a token has an expert on a rank."""
        ranks = self.nodes.size * self.node.size
        rank_N = self.placement.rank_of(by_slot.expert_ids_N())  # P: experts without rows, cut off
        here_PT = rank_N.new_zeros(ranks + 1, tokens, dtype=torch.bool)
        here_PT[rank_N, by_slot.token_ids_N] = True
        return here_PT[:ranks]

    def _exchange_counts(self, here_PT: Tensor, by_slot: Assignment) -> _Counts:
        """Column 0: distinct rows; the others: assignments of each expert."""
        places, width = self.node.size, 1 + self.placement.per_rank
        counts_Pe = self.placement.counts_Pe(by_slot)
        own_MLC = torch.cat([here_PT.sum(1)[:, None], counts_Pe], 1).view(-1, places, width)
        distinct_M1 = here_PT.unflatten(0, (self.nodes.size, places)).any(1).sum(1)[:, None]
        stamp = self.nodes.calls.next(self.nodes.layer)
        own_MW = F.pad(torch.cat([distinct_M1, own_MLC.flatten(1)], 1), (0, 1), value=stamp)
        near_MW = self.nodes.all_to_all("counts", own_MW)
        near_MLC = near_MW[:, 1:-1].reshape(own_MLC.shape)
        leaving_LW = F.pad(near_MLC.transpose(0, 1).flatten(1), (0, 1), value=stamp)
        far_LW = self.node.all_to_all("counts", leaving_LW)
        far_LMC = far_LW[:, :-1].reshape(places, -1, width)
        nodes, node, useful = self._split_sizes(*self.node.on_host("counts", own_MW, near_MW, far_LW))
        return _Counts(near_MW[:, 0], near_MLC, far_LMC, useful, nodes, node)

    def _split_sizes(
        self, own: list[list[int]], near: list[list[int]], far: list[list[int]]
    ) -> tuple[tuple[SplitSizes, SplitSizes], tuple[SplitSizes, SplitSizes], list[int]]:
        """Split sizes between nodes and inside this one, and rows of each expert here."""
        for exchange, theirs in ((self.nodes, near), (self.node, far)):
            exchange.check(own[0][-1], [row[-1] for row in theirs])
        width = 1 + self.placement.per_rank
        own_ML, near_ML, far_LM = _cells(own, 1, width), _cells(near, 1, width), _cells(far, 0, width)
        near_LM = list(zip(*near_ML, strict=True))
        nodes = (
            SplitSizes(self.nodes, [row[0] for row in own], [row[0] for row in near]),
            SplitSizes(self.nodes, [*map(_assignments, own_ML)], [*map(_assignments, near_ML)]),
        )
        node = (
            SplitSizes(self.node, [_rows(row) for row in near_LM], [_rows(row) for row in far_LM]),
            SplitSizes(self.node, [*map(_assignments, near_LM)], [*map(_assignments, far_LM)]),
        )
        useful = [sum(cell[1 + e] for row in far_LM for cell in row) for e in range(self.placement.per_rank)]
        return nodes, node, useful

    def _spread(self, counts: _Counts, arrived_mW: Tensor) -> tuple[Level, Tensor]:
        """What becomes of the assignments that came to this rank for its node: each goes to its expert's."""
        size = arrived_mW.shape[0]
        per_rank_ML = counts.near_MLC[..., 1:].sum(2)
        rows_m = arrived_mW[:, 0] + _starts(counts.near_rows_M, per_rank_ML.sum(1), size)
        ranks_L = torch.arange(self.node.size, device=rows_m.device)
        rank_m = torch.repeat_interleave(
            ranks_L.repeat(self.nodes.size), per_rank_ML.view(-1), output_size=size
        )
        num_rows = sum(counts.nodes[0].received)
        here_LR = rank_m.new_zeros(self.node.size, num_rows, dtype=torch.bool)
        here_LR[rank_m, rows_m] = True
        sent = sum(counts.node[0].sent)
        index_v, numbers_m = _distinct(here_LR, rank_m, rows_m, sent, self.backend)
        order_m = stable_order(rank_m, self.node.size)
        leaving_mW = torch.cat([numbers_m[:, None].to(arrived_mW.dtype), arrived_mW[:, 1:]], 1)
        return Level(*counts.node, index_v, order_m), leaving_mW[order_m]

    def _plan(
        self, counts: _Counts, rows_x: Tensor, weights_x: Tensor, scales: list[Tensor], block: int
    ) -> Plan:
        """Assignments come by (place, node, expert) of their senders; experts want (expert, node, place)."""
        places, nodes, ranks = self.node.size, self.nodes.size, self.nodes.size * self.node.size
        place_L, node_M, expert_e = (
            torch.arange(n, device=rows_x.device) for n in (places, nodes, self.placement.per_rank)
        )
        key_LMe = place_L[:, None, None] + places * node_M[:, None] + ranks * expert_e
        counts_LMe = counts.far_LMC[:, :, 1:]
        key_x = torch.repeat_interleave(key_LMe.view(-1), counts_LMe.reshape(-1), output_size=rows_x.shape[0])
        order_x = stable_order(key_x, ranks * self.placement.per_rank)
        sources_x = rows_x[order_x] if self.node_sums else order_x
        num_source = sum(counts.node[0].received) if self.node_sums else rows_x.shape[0]
        scale_x = scales[0][order_x] if scales else None
        here = Assignment(sources_x, weights_x[order_x], counts_LMe.sum((0, 1)), scale_x)
        return place(here, counts.useful, num_source, block, self.backend)


def _cells(table: list[list[int]], first: int, width: int) -> list[list[list[int]]]:
    """Each row without its stamp, from ``first`` on, in parts of ``width``: distinct rows, assignments."""
    return [[row[i : i + width] for i in range(first, len(row) - 1, width)] for row in table]


def _rows(cells: Sequence[list[int]]) -> int:
    return sum(cell[0] for cell in cells)


def _assignments(cells: Sequence[list[int]]) -> int:
    return sum(sum(cell[1:]) for cell in cells)


def _distinct(
    here_GS: Tensor, groups_n: Tensor, sources_n: Tensor, size: int, backend: str
) -> tuple[RowIndex, Tensor]:
    """The ``size`` (group, source) pairs that are True, in that order, and each one's number in its group."""
    places_n = (here_GS.view(-1).cumsum(0) - 1)[groups_n * here_GS.shape[1] + sources_n]
    ids_u = places_n.new_empty(size).scatter_(0, places_n, sources_n)
    sizes_G = here_GS.sum(1)
    return RowIndex.of(ids_u, here_GS.shape[1], backend), places_n - (sizes_G.cumsum(0) - sizes_G)[groups_n]


def _starts(rows_G: Tensor, assignments_G: Tensor, size: int) -> Tensor:
    """Of each assignment, by sender, the first of its sender's rows."""
    return torch.repeat_interleave(rows_G.cumsum(0) - rows_G, assignments_G, output_size=size)

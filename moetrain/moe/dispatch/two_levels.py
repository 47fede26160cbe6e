"""Routes over two levels: between nodes, then inside a node.

Shapes: T tokens, D model; rows of an assignment each (n at home, m in its node, x at its expert) and distinct
rows (u leave home, v leave the rank that they reached in the node, X arrive).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moetrain.moe.dispatch.collectives import PendingCollective, SplitSizes
from moetrain.moe.dispatch.row_index import RowIndex, inverse, scaled


@dataclass(frozen=True)
class Level:
    """One level: ``rows`` sends distinct rows, ``each`` one row an assignment, in the order ``order_n``."""

    rows: SplitSizes
    each: SplitSizes
    index: RowIndex
    order_n: Tensor | None = None


@dataclass(frozen=True)
class Summed:
    """The route that sums a token's rows on each rank, then in each node, then on the token's rank."""

    nodes: Level
    node: Level
    chunks: int = 1

    def dispatch_start(self, name: str, x_TD: Tensor, chunk: int) -> PendingCollective:
        return self.nodes.rows.out(name, self.nodes.index.take(x_TD))

    def dispatch_wait(self, name: str, pending: PendingCollective, chunk: int) -> Tensor:
        return self.node.rows.out(name, self.node.index.take(pending.wait())).wait()

    def combine_start(self, name: str, rows_XD: Tensor, chunk: int) -> PendingCollective:
        rows_vD = self.node.rows.back(name, rows_XD).wait()
        return self.nodes.rows.back(name, self.node.index.total(rows_vD))

    def combine_wait(self, pending: list[PendingCollective], with_scale: bool) -> Tensor:
        return self.nodes.index.total(pending[0].wait())


@dataclass(frozen=True)
class Unsummed:
    """The route that returns one row an assignment; the token's rank sums them in expert order."""

    nodes: Level
    node: Level
    expand_x: Tensor  # the row that arrived of each assignment
    home: RowIndex
    scale_n: Tensor | None
    chunks: int = 1

    def dispatch_start(self, name: str, x_TD: Tensor, chunk: int) -> PendingCollective:
        return self.nodes.rows.out(name, self.nodes.index.take(x_TD))

    def dispatch_wait(self, name: str, pending: PendingCollective, chunk: int) -> Tensor:
        rows_XD = self.node.rows.out(name, self.node.index.take(pending.wait())).wait()
        return rows_XD.index_select(0, self.expand_x)

    def combine_start(self, name: str, rows_xD: Tensor, chunk: int) -> PendingCollective:
        assert self.node.order_n is not None
        rows_mD = self.node.each.back(name, rows_xD).wait()
        return self.nodes.each.back(name, rows_mD.index_select(0, inverse(self.node.order_n)))

    def combine_wait(self, pending: list[PendingCollective], with_scale: bool) -> Tensor:
        return self.home.total(scaled(pending[0].wait(), self.scale_n if with_scale else None))

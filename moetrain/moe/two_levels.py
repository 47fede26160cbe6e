"""The ways of rows over two levels: between nodes, then inside one.

Shapes: T tokens, D model; rows of an assignment each (n at home, m in its node, x at its expert) and distinct
rows (u leave home, v leave the rank that they reached in the node, X arrive).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moetrain.moe.all_to_all import inverse, scale
from moetrain.moe.exchange import Flight, Link
from moetrain.moe.journey import Picked


@dataclass(frozen=True)
class Level:
    """Distinct rows out over ``rows``; one row an assignment over ``each``, whose order is ``order_n``."""

    rows: Link
    each: Link
    picked: Picked
    order_n: Tensor | None = None


@dataclass(frozen=True)
class Summed:
    """A node's rows of a token are summed on their ranks, then in the node, then at home."""

    nodes: Level
    node: Level
    chunks: int = 1

    def leave(self, name: str, x_TD: Tensor, chunk: int) -> Flight:
        return self.nodes.rows.out(name, self.nodes.picked.take(x_TD))

    def arrive(self, name: str, flight: Flight, chunk: int) -> Tensor:
        return self.node.rows.out(name, self.node.picked.take(flight.wait())).wait()

    def turn_back(self, name: str, rows_XD: Tensor, chunk: int) -> Flight:
        rows_vD = self.node.rows.back(name, rows_XD).wait()
        return self.nodes.rows.back(name, self.node.picked.total(rows_vD))

    def come_home(self, flights: list[Flight], scaled: bool) -> Tensor:
        return self.nodes.picked.total(flights[0].wait())


@dataclass(frozen=True)
class Unsummed:
    """One row an assignment comes back, and all sums are made at home, in expert order."""

    nodes: Level
    node: Level
    expand_x: Tensor  # the row that arrived of each assignment
    home: Picked
    scale_n: Tensor | None
    chunks: int = 1

    def leave(self, name: str, x_TD: Tensor, chunk: int) -> Flight:
        return self.nodes.rows.out(name, self.nodes.picked.take(x_TD))

    def arrive(self, name: str, flight: Flight, chunk: int) -> Tensor:
        rows_XD = self.node.rows.out(name, self.node.picked.take(flight.wait())).wait()
        return rows_XD.index_select(0, self.expand_x)

    def turn_back(self, name: str, rows_xD: Tensor, chunk: int) -> Flight:
        assert self.node.order_n is not None
        rows_mD = self.node.each.back(name, rows_xD).wait()
        return self.nodes.each.back(name, rows_mD.index_select(0, inverse(self.node.order_n)))

    def come_home(self, flights: list[Flight], scaled: bool) -> Tensor:
        return self.home.total(scale(flights[0].wait(), self.scale_n if scaled else None))

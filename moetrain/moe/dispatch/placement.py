"""The placement of experts: the rank that holds each, and its slot among that rank's experts.

Shapes: E experts with a feed-forward network, P ranks, e experts (slots) a rank, N assignments.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moetrain.moe.assign import stable_order
from moetrain.moe.assignment import Assignment
from moetrain.moe.dispatch.row_index import inverse
from moetrain.ops.transfer import to_device


@dataclass(frozen=True)
class Placement:
    """Which rank holds which expert. ``experts`` lists them rank by rank, slot by slot, equally many a rank.

    Raises ValueError if the ranks do not divide the experts, or if an expert is not listed exactly once.
    """

    ranks: int
    experts: tuple[int, ...]

    @staticmethod
    def contiguous(num_experts: int, ranks: int) -> Placement:
        """The placement of ``num_experts`` in blocks of consecutive experts, in rank order."""
        return Placement(ranks, tuple(range(num_experts)))

    def __post_init__(self) -> None:
        if len(self.experts) % self.ranks:
            raise ValueError(f"{self.ranks} ranks do not divide {len(self.experts)} experts")
        if sorted(self.experts) != list(range(len(self.experts))):
            raise ValueError(f"a placement names each of its experts once, not {self.experts}")

    @property
    def per_rank(self) -> int:
        """The number of experts on each rank."""
        return len(self.experts) // self.ranks

    def of_rank(self, rank: int) -> tuple[int, ...]:
        """The experts of a rank, by slot."""
        return self.experts[rank * self.per_rank : (rank + 1) * self.per_rank]

    @cached_property
    def is_contiguous(self) -> bool:
        return self.experts == tuple(range(len(self.experts)))

    def by_slot(self, assignment: Assignment) -> Assignment:
        """The assignment sorted by (rank, slot, token): its experts are then slots, numbered rank by rank."""
        if self.is_contiguous:
            return assignment
        extra = assignment.num_experts - len(self.experts)
        order = torch.tensor([*self.experts, *range(len(self.experts), len(self.experts) + extra)])
        order_E = to_device(order, assignment.counts_E.device)
        index_N = stable_order(inverse(order_E)[assignment.expert_ids_N()], len(order))
        host = assignment.host_counts
        host_counts = None if host is None else tuple(host[expert] for expert in order.tolist())
        return assignment.select(index_N, assignment.counts_E[order_E], host_counts)

    def counts_Pe(self, by_slot: Assignment) -> Tensor:
        """How many assignments go to each slot of each rank, contiguous."""
        return by_slot.ffn_counts_e.reshape(self.ranks, self.per_rank).contiguous()

    def rank_of(self, slots_N: Tensor) -> Tensor:
        """The rank of each slot (``by_slot(...).expert_ids_N()``); P for experts without a network."""
        return (slots_N // self.per_rank).clamp(max=self.ranks)

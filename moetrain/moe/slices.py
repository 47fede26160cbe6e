"""Experts of different widths, as slices of one width that compute like experts.

A network of h hidden units is the sum of h / u networks of u units each, so an expert's tokens go to each of
its slices with the same weight; u is the greatest common divisor of the widths. Parameters and products are
exactly those of the widths, and every backend, dispatcher and layout takes slices as it takes experts. But
what goes once to an expert goes once to each of its slices: rows in memory, and over all_to_all.

Shapes: E experts, S slices, N assignments to experts, M to slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.moe.assignment import Assignment
from moetrain.ops.transfer import to_device


@dataclass(frozen=True)
class Slices:
    """``unit``: hidden units of a slice. ``per_expert``: how many slices each expert has, in their order."""

    unit: int
    per_expert: tuple[int, ...]

    @staticmethod
    def of(widths: Sequence[int]) -> Slices:
        """Raises ValueError for no widths."""
        if not widths:
            raise ValueError("experts of different widths: give a width for each")
        unit = math.gcd(*widths)
        return Slices(unit, tuple(width // unit for width in widths))

    @property
    def total(self) -> int:
        """S."""
        return sum(self.per_expert)

    @property
    def most(self) -> int:
        """The slices of the widest expert."""
        return max(self.per_expert)

    def widths_E(self, num_experts: int, device: torch.device) -> Tensor:
        """int64, the hidden units of each of ``num_experts``; those without a network have 0."""
        widths = [self.unit * slices for slices in self.per_expert]
        return to_device(torch.tensor(widths + [0] * (num_experts - len(widths))), device)

    def assign(self, assignment: Assignment) -> Assignment:
        """The assignments to slices, sorted by (slice, token). Experts without a network stay the last.

        The host waits once, for their number, unless the router gave its counts.
        """
        extra = assignment.num_experts - len(self.per_expert)
        slices = [*self.per_expert, *[1] * extra]
        experts = [expert for expert, number in enumerate(slices) for _ in range(number)]
        device = assignment.counts_E.device
        experts_S = to_device(torch.tensor(experts), device)
        host = assignment.host_counts
        counts_S = assignment.counts_E[experts_S]
        host_counts = None if host is None else tuple(host[expert] for expert in experts)
        size = int(counts_S.sum()) if host_counts is None else sum(host_counts)
        slice_M = torch.repeat_interleave(
            torch.arange(len(experts), device=device), counts_S, output_size=size
        )
        first_S = (assignment.counts_E.cumsum(0) - assignment.counts_E)[experts_S]
        moved_S = first_S - (counts_S.cumsum(0) - counts_S)
        index_M = torch.arange(size, device=device) + moved_S[slice_M]
        without = None if assignment.num_ffn_experts is None else self.total
        return replace(assignment.select(index_M, counts_S, host_counts), num_ffn_experts=without)

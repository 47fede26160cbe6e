"""Rows of the experts' operator, in segments of experts.

Shapes: X source rows, R computed rows in block-aligned expert order, E experts, N assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The rows of each expert, rounded up to multiples of ``block``.

    counts_E   int64, rows without padding, on the device.
    useful     the same as host integers, or None where the host has not waited for them.
    """

    counts_E: Tensor
    block: int
    useful: Sequence[int] | None

    @property
    def on_host(self) -> Sequence[int]:
        """``useful``, of a backend that needs it."""
        assert self.useful is not None
        return self.useful

    @property
    def aligned(self) -> list[int]:
        """Rows with padding, on the host."""
        return [-(-rows // self.block) * self.block for rows in self.on_host]

    @property
    def aligned_E(self) -> Tensor:
        """The same on the device."""
        return (self.counts_E + (self.block - 1)) // self.block * self.block

    @property
    def num_experts(self) -> int:
        return self.counts_E.shape[0]

    def bound(self, num_assignments: int) -> int:
        """The most rows that these segments can need, whatever the counts: known without waiting.

        Most padding has a row of its own in each used expert, and whole blocks of all others.
        """
        used = (
            self.num_experts
        )  # a traced layer may not compare a number of assignments that it does not know
        if not torch.compiler.is_compiling():
            used = min(used, num_assignments)
        return ((num_assignments - used) // self.block + used) * self.block


def all_rows(segments: Segments, rows: int, dtype: torch.dtype) -> list[int]:
    """The rows of the pre-activations of a backend that keeps those of all ``rows`` in one tensor."""
    return [rows]


@dataclass(frozen=True)
class Rows:
    """Which source row each computed row is, and back.

    ids_R      int64, source row of each computed row, -1 for padding and behind the last segment.
    by_source_N  computed rows grouped by their source row; ends_X closes each group.
    """

    ids_R: Tensor
    segments: Segments
    by_source_N: Tensor
    ends_X: Tensor

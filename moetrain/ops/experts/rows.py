"""Rows of the experts' operator.

Shapes: X source rows, R computed rows in block-aligned expert order, E experts, N assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Which source row each computed row is, and back.

    ids_R      int64, source row of each computed row, -1 for padding.
    useful     rows of each expert without padding, host integers.
    aligned    rows of each expert with padding; sums to R.
    by_source_N  computed rows grouped by their source row; ends_X closes each group.
    """

    ids_R: Tensor
    useful: Sequence[int]
    aligned: Sequence[int]
    by_source_N: Tensor
    ends_X: Tensor

"""An index of rows taken from source rows, and of their sums back at the source.

Shapes: X source rows, D model, u rows taken (a source row any number of times).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.moe.assign import count, stable_order
from moetrain.ops import gather_sum


@dataclass(frozen=True)
class RowIndex:
    """``ids_u``: the source of each row; ``by_source_u`` and ``ends_X`` group the rows by it.

    ``backend``: ``experts.backend``, which sums follow.
    """

    ids_u: Tensor
    by_source_u: Tensor
    ends_X: Tensor
    backend: str

    @staticmethod
    def of(ids_u: Tensor, num_source: int, backend: str) -> RowIndex:
        ends_X = count(ids_u, num_source).cumsum(0)
        return RowIndex(ids_u, stable_order(ids_u, num_source), ends_X, backend)

    def take(self, source_XD: Tensor) -> Tensor:
        """The rows [u, D]."""
        return source_XD.index_select(0, self.ids_u)

    def total(self, rows_uD: Tensor) -> Tensor:
        """Each source row's rows summed, in the order of ``by_source_u``: [X, D]."""
        return gather_sum(rows_uD, self.by_source_u, self.ends_X, self.ids_u, self.backend)


def inverse(order_n: Tensor) -> Tensor:
    """The place of each element in a permutation."""
    return torch.empty_like(order_n).scatter_(0, order_n, torch.arange(len(order_n), device=order_n.device))


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scaled(rows_nD: Tensor, scale_n: Tensor | None) -> Tensor:
    """Rows times their forward scale, in their own dtype."""
    return rows_nD if scale_n is None else (rows_nD * scale_n[:, None]).to(rows_nD.dtype)

"""The sum of each source row's computed rows, one row at a time: what kernels/combine.py computes.

Shapes: R computed rows, D width, X source rows, N assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor


def combine(rows_RD: Tensor, by_source_N: Tensor, ends_X: Tensor) -> Tensor:
    """out [X, D], summed in the rows' own type in the order of ``by_source_N``."""
    out_XD = rows_RD.new_zeros(ends_X.shape[0], rows_RD.shape[1])
    starts = torch.cat([ends_X.new_zeros(1), ends_X]).tolist()
    for x in range(ends_X.shape[0]):
        for row in by_source_N[starts[x] : starts[x + 1]].tolist():
            out_XD[x] += rows_RD[row]
    return out_XD

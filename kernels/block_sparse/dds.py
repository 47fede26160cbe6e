"""DDS: a dense matrix times a block-sparse one or its transpose, as DSD of the transposed operands.

Shapes: Q rows of the dense matrix, M rows and G groups of W columns of the sparse one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dsd import dsd
from .topology import Topology


def dds(
    dense: Tensor,
    values_VW: Tensor,
    topology: Topology,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
    tf32: bool = False,
) -> Tensor:
    """``dense @ S`` [G, Q, W] of dense [Q, M], or transposed ``dense @ S^T`` [Q, M] of dense [G, Q, W].

    ``S`` has the values in the topology's blocks and zeros elsewhere; the result has ``dtype``. Everything
    else is as in :func:`dsd`, whose kernel reads and writes any strides.
    """
    rows, columns, count = topology.rows, topology.columns, dense.shape[-2]
    shape = (count, rows.width) if transposed else (columns.groups, count, columns.width)
    out = dense.new_empty(shape, dtype=dtype)
    dsd(values_VW, topology, dense.mT, not transposed, out.mT, tf32=tf32)
    return out

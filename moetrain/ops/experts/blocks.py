"""The number of rows that each expert's rows are rounded up to a multiple of."""

from __future__ import annotations

import torch

from moetrain.kernels.tiles import rows_of_tile

_CPU = 32
_TRACED = 128


def usual_block(device: torch.device, dtype: torch.dtype, assignments: int, experts: int) -> int:
    """The block for products in ``dtype`` on a device, where none is asked for.

    On a CPU it is always the same. On an accelerator it is the rows of the kernels' tile for the mean rows of
    an expert, ``assignments / experts``: one of a few powers of two, known on the host whatever the router
    chose. So nothing waits, and counts that change compile nothing anew. A traced layer may not look at a
    number of assignments, and always has the same.
    """
    if device.type == "cpu":
        return _CPU
    if torch.compiler.is_compiling():
        return _TRACED
    return rows_of_tile(dtype, assignments / max(experts, 1))

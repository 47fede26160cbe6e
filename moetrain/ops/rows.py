"""Writing one row of a parameter, whole or sharded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def set_row(parameter: Tensor, row: int, value: Tensor) -> None:
    """In place; a sharded parameter is put together and taken apart again, on all its ranks."""
    if not isinstance(parameter, DTensor):
        parameter[row] = value.to(parameter.dtype)
        return
    whole = parameter.full_tensor().clone()
    whole[row] = value.to(whole.dtype)
    parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))

"""The part of a tensor that is on this rank, the whole of it, and writing a row of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, which may be empty; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor; every rank of a DTensor's mesh must ask."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


@torch.no_grad()
def set_row(parameter: Tensor, row: int, value: Tensor) -> None:
    """In place; a sharded parameter is put together and taken apart again, on all its ranks."""
    if not isinstance(parameter, DTensor):
        parameter[row] = value.to(parameter.dtype)
        return
    full = parameter.full_tensor().clone()
    full[row] = value.to(full.dtype)
    parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))

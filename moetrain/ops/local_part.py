"""The part of a tensor that is on this rank."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, which may be empty; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

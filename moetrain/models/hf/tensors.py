"""What a stored tensor is, and the interface that every kind of checkpoint file has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

# what weights may be; and quantised ones
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED = DTYPES | {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


# Of each dimension, which elements: as an index of numpy, with both ends of every slice given.
Part = tuple[int | slice, ...]


class Source(Protocol):
    """A checkpoint in Hugging Face's names.

    ``read`` returns a tensor of its own, in the stored dtype: the whole, or a part of it.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def read(self, name: str, part: Part | None = None) -> Tensor: ...


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes in C order, not copied where it is contiguous."""
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def dtype_names() -> dict[torch.dtype, str]:
    """What safetensors calls the dtypes that are read and written here."""
    return {dtype: name for name, dtype in DTYPES.items()}

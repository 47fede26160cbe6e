"""Random numbers that depend on the seed, the layer and what they are for, and on no order of work."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(seed: int, layer: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for each purpose in each layer."""
    digest = hashlib.sha256(f"{seed}/{layer}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What draws and statistics of tensors of ``dtype`` are computed in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def normal(shape: torch.Size | tuple[int, ...], gen: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Standard normal values, drawn in :func:`wide` of ``dtype`` and left there."""
    return torch.randn(shape, generator=gen, dtype=wide(dtype))

"""Views of more than 2 ** 31 elements that take next to no memory: only pages that are touched are there."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

_FRONT = 1 << 31


def spread(values: Tensor, index: int) -> Tensor:
    """A copy of ``values`` of which ``values[index]`` lies beyond 2 ** 31 elements.

    It begins behind as many that nobody has written: an offset that wraps reads zeros there, and what is
    written there is missing from the copy, instead of a fault that ends the process.
    """
    inner = torch.empty(values.shape[1:], device="meta").stride()
    stride = _FRONT // index + 8
    elements = _FRONT + stride * (values.shape[0] - 1) + values[0].numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, elements * values.element_size(), flags=flags)
    except OSError as error:
        pytest.skip(f"no {elements * values.element_size() >> 30} GB of addresses: {error}")
    flat = torch.frombuffer(memory, dtype=values.dtype, count=elements)
    return flat.as_strided(values.shape, (stride, *inner), _FRONT).copy_(values)

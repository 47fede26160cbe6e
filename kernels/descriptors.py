"""Tensor descriptors of contiguous operands, whose tiles the device copies by itself (TMA).

What lies outside an operand is read as zeros, as by a masked load: both forms of a kernel read equal tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .specimen import pointer

_ALIGNED = 16  # bytes: the operand's start, its strides, and a row of a block
_MOST_BLOCK = 256
_MOST_SIZE, _MOST_STRIDE = 2**31 - 1, 2**40 - 1  # elements, since coordinates are int32; bytes

Operand = Tensor | TensorDescriptor


def refusal(operand: Tensor, block: tuple[int, ...], dtype: torch.dtype, start: int = 0) -> str | None:
    """Why no descriptor reads blocks of the operand as ``dtype``; None if one does.

    Blocks start at multiples of their size, and ``start`` elements behind these in the last dimension too.
    """
    itemsize = operand.element_size()
    if operand.dtype is not dtype:
        return f"it is {operand.dtype} and computed with in {dtype}"
    if operand.stride(-1) != 1:
        return f"elements of a row are {operand.stride(-1)} apart"
    if operand.data_ptr() % _ALIGNED:
        return f"it starts {operand.data_ptr() % _ALIGNED} bytes behind a multiple of {_ALIGNED}"
    for size in operand.shape:
        if not 0 < size <= _MOST_SIZE:
            return f"a dimension has {size} elements, not 1 to {_MOST_SIZE}"
    for stride in operand.stride()[:-1]:
        if stride * itemsize % _ALIGNED or not 0 < stride * itemsize <= _MOST_STRIDE:
            return (
                f"a stride has {stride * itemsize} bytes, no multiple of {_ALIGNED} from 1 to {_MOST_STRIDE}"
            )
    if start * itemsize % _ALIGNED:
        return f"blocks start {start * itemsize} bytes behind others, no multiple of {_ALIGNED}"
    if max(block) > _MOST_BLOCK or block[-1] * itemsize < _ALIGNED:
        return f"a block of {block} has a side above {_MOST_BLOCK}, or a row below {_ALIGNED} bytes"
    return None


def described(
    operand: Tensor, block: tuple[int, ...], dtype: torch.dtype, start: int = 0
) -> TensorDescriptor | None:
    """A descriptor of the operand in blocks, or None where :func:`refusal` has a reason."""
    if refusal(operand, block, dtype, start):
        return None
    return TensorDescriptor(operand, list(operand.shape), list(operand.stride()), list(block))


def descriptor(dtype: torch.dtype, *block: int) -> str:
    """Triton's name of a descriptor's type, such as "tensordesc<bf16[64, 128]>"."""
    return f"tensordesc<{pointer(dtype)[1:]}[{', '.join(map(str, block))}]>"

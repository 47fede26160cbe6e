"""What the block-sparse kernels share: the walk over tiles, a step of a product, checks of operands."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..specimen import pointer
from ..tiles import BLOCK_M, Arch, arch_of

INDICES = ("rows_of", "columns_of", "experts", "starts", "ends", "stored", "across")
OPERANDS = ("out", "values", "dense", "a", "b", "z", "h", "dz", "dh", "weights", "dweights")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def walk(program, lines, across, GROUP: tl.constexpr):
    """(line, position across) of a program: ``GROUP`` lines at a time, which share what lies across in L2."""
    first = program // (GROUP * across) * GROUP
    height = min(lines - first, GROUP)
    within = program % (GROUP * across)
    return first + within % height, within // height


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """``sums + a @ b`` in fp32; ``UPCAST`` for Triton's interpreter, which has no product of bf16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


def checked(*operands: Tensor) -> Arch:
    """The architecture that the operands lie on.

    Raises ValueError for operands of several types or devices, and for a type without kernels.
    """
    dtype, device = operands[0].dtype, operands[0].device
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"block-sparse kernels take bf16, fp16 and fp32, not {name}")
    for operand in operands:
        if operand.dtype is not dtype or operand.device != device:
            raise ValueError(
                f"the operands of a product are {dtype} on {device} and {operand.dtype} on {operand.device}"
            )
    return arch_of(device)


def has_shape(operand: Tensor, name: str, *shape: int) -> None:
    """Raise ValueError unless the operand has the shape."""
    if tuple(operand.shape) != shape:
        raise ValueError(f"{name} is {tuple(operand.shape)}, what it goes with needs {shape}")


def on_device(operand: Tensor) -> AbstractContextManager[object]:
    """A context whose current device is the operand's, which Triton launches on."""
    return torch.cuda.device(operand.device) if operand.is_cuda else nullcontext()


def shipped(arch: Arch) -> list[tuple[torch.dtype, bool, int, bool]]:
    """(type, tf32, rows of a block, whether in every layout) that kernels are compiled for ahead of time."""
    types = [(torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.float32, True)]
    return [(dtype, tf32, rows, n == 0) for n, (dtype, tf32) in enumerate(types) for rows in BLOCK_M]


def signature(
    kernel: triton.JITFunction, constants: Mapping[str, object], dtype: torch.dtype
) -> dict[str, str]:
    """Types of the arguments that are no constants: ``INDICES`` of int32, pointers to ``dtype``, integers."""
    found = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        found[name] = "i32"
        if name in INDICES:
            found[name] = pointer(torch.int32)
        elif name in OPERANDS:
            found[name] = pointer(torch.float32 if name.endswith("weights") else dtype)
    return found

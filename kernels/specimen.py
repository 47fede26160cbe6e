"""A kernel as it is launched, named so that it can be compiled ahead of time for a GPU that is not here.

Every module of kernels has ``specimens(arch) -> list[Specimen]``: each kernel at every tile it ships with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .tiles import Tile

_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip


class Kernel(Protocol):
    """What ``triton.jit`` makes."""

    __name__: str
    arg_names: list[str]


@dataclass(frozen=True)
class Specimen:
    """One kernel with its argument types, constants and launch options.

    ``signature`` has the type of each argument that is no constant ("*bf16", "*i64", "i32", "fp32"), and
    ``constants`` the value of each that is. Pointers are taken to be aligned to 16 bytes, and integers to be
    multiples of 16, as widths and strides of the published shapes are; but those in ``do_not_specialize`` are
    not. ``products`` says that tensor-core instructions must appear. ``tile`` is what the kernel computes at
    once, None without products; ``accumulators`` is the number of products of one tile of rows.
    """

    name: str
    kernel: Kernel
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
    products: bool
    tile: Tile | None = field(default=None)
    accumulators: int = 1


def pointer(dtype: torch.dtype) -> str:
    """Triton's name of a pointer to elements of a type, such as "*bf16"; KeyError for a type without one."""
    return "*" + _TYPES[dtype]

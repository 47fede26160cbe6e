"""What the Triton backends share: when they refuse a case, and which expert each block of rows belongs to.

Shapes: E experts, B blocks of rows, R = B * block rows.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from moetrain.ops.experts.case import Case
from moetrain.ops.experts.rows import Segments

_OLDEST = (3, 4)
BLOCKS = (16, 32, 64, 128)  # rows of a tile
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal_of_kernels(case: Case) -> str | None:
    """Why no kernel of this package can compute ``case``; None where one may."""
    if (reason := refusal_of_triton(case)) is not None:
        return reason
    if case.dtype not in _DTYPES:
        return f"the kernels do not take {case.dtype}"
    if case.block not in BLOCKS:
        return f"experts.block={case.block} is not one of {', '.join(map(str, BLOCKS))}"
    return None


def refusal_of_triton(case: Case) -> str | None:
    """Why Triton cannot run where ``case`` is; None where it may."""
    if case.device.type == "cpu" and not _interpreted():
        return "Triton needs a GPU (or TRITON_INTERPRET=1, to try it on a CPU)"
    if case.device.type not in ("cpu", "cuda"):
        return f"the kernels are for NVIDIA's and AMD's GPUs, not {case.device.type}"
    return _missing()


def block_experts_B(segments: Segments, rows: int) -> Tensor:
    """The expert of each block, int32, -1 behind the last used one. Waits for nothing."""
    blocks_B = torch.arange(rows // segments.block, device=segments.counts_E.device)
    experts_B = torch.searchsorted(block_starts_E1(segments)[1:], blocks_B, right=True)
    return experts_B.masked_fill_(experts_B == segments.num_experts, -1).int()


def block_starts_E1(segments: Segments) -> Tensor:
    """The first block of each expert, int64; the last entry is the number of used blocks."""
    blocks_E = segments.aligned_E // segments.block
    return torch.cat([blocks_E.new_zeros(1), blocks_E.cumsum(0)])


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "") == "1"


@cache
def _missing() -> str | None:
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed (pip install 'moetrain[triton]')"
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if numbers < _OLDEST:
        return f"Triton {found} is older than {'.'.join(map(str, _OLDEST))}"
    return None

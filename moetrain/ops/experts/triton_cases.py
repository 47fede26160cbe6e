"""What the Triton backends share: when they refuse a case, and which expert each block of rows belongs to.

Shapes: E experts, B blocks of rows, R = B * block rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.ops.experts.biases import NO_BIASES
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.rows import Segments
from moetrain.ops.triton_support import KERNEL_DTYPES, device_refusal

BLOCKS = (16, 32, 64, 128)  # rows of a tile


def refusal_of_kernels(case: Case) -> str | None:
    """Why no Triton kernel can compute ``case``; None where one may."""
    if (reason := device_refusal(case.device)) is not None:
        return reason
    if case.bias:
        return NO_BIASES
    if case.dtype not in KERNEL_DTYPES:
        return f"the kernels do not take {case.dtype}"
    if case.block not in BLOCKS:
        return f"experts.block={case.block} is not one of {', '.join(map(str, BLOCKS))}"
    return None


def block_experts_B(segments: Segments, rows: int) -> Tensor:
    """The expert of each block, int32, -1 behind the last used one. Waits for nothing."""
    blocks_B = torch.arange(rows // segments.block, device=segments.counts_E.device)
    experts_B = torch.searchsorted(block_starts_E1(segments)[1:], blocks_B, right=True)
    return experts_B.masked_fill_(experts_B == segments.num_experts, -1).int()


def block_starts_E1(segments: Segments) -> Tensor:
    """The first block of each expert, int64; the last entry is the number of used blocks."""
    blocks_E = segments.aligned_E // segments.block
    return torch.cat([blocks_E.new_zeros(1), blocks_E.cumsum(0)])

"""Grouped matrix product: consecutive segments of rows, each times its own matrix.

Shapes: R rows, E groups, K inner, N outer; ``counts`` are the rows of each group (a list of host integers,
zeros allowed, summing to R).

Backends: ``loop`` is the oracle (autograd through plain products); ``torch`` is
``torch.nn.functional.grouped_mm`` where it accepts the operands (fp32, bf16 or fp16, row strides that are
multiples of 16 bytes) and products per group on unbound matrices elsewhere, which it says once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.ops.say_once import say_once
from moetrain.ops.transfer import to_device

_ALIGN_BYTES = 16
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_mm(rows_RK: Tensor, weights_EKN: Tensor, counts: Sequence[int], backend: str = "torch") -> Tensor:
    """``out[segment e] = rows[segment e] @ weights[e]``, shape [R, N], differentiable in both operands."""
    if len(counts) != weights_EKN.shape[0] or sum(counts) != rows_RK.shape[0]:
        raise ValueError(
            f"counts: {len(counts)} groups of {sum(counts)} rows, but there are "
            f"{weights_EKN.shape[0]} matrices and {rows_RK.shape[0]} rows"
        )
    if backend not in BACKENDS:
        raise ValueError(f"unknown grouped_mm backend {backend!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[backend](rows_RK, weights_EKN, counts)


def _loop(rows_RK: Tensor, weights_EKN: Tensor, counts: Sequence[int]) -> Tensor:
    # unbind, not weights[e]: indexing makes backward write one full-size zero tensor per group
    products = [
        x_nK @ w_KN for x_nK, w_KN in zip(rows_RK.split(list(counts)), weights_EKN.unbind(), strict=True)
    ]
    return torch.cat(products) if products else rows_RK.new_zeros(0, weights_EKN.shape[2])


def _torch(rows_RK: Tensor, weights_EKN: Tensor, counts: Sequence[int]) -> Tensor:
    if not rows_RK.shape[0]:  # which it does not take
        return _loop(rows_RK, weights_EKN, counts)
    reason = refusal(rows_RK.device, rows_RK.dtype, weights_EKN.shape[1:])
    if reason is not None:
        say_once(f"grouped_mm: {reason}; running one product per group")
        return _loop(rows_RK, weights_EKN, counts)
    return F.grouped_mm(rows_RK, weights_EKN, offs=offsets(counts, rows_RK.device))


BACKENDS: dict[str, Callable[[Tensor, Tensor, Sequence[int]], Tensor]] = {"loop": _loop, "torch": _torch}


def offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    """The end of each segment, int32, as torch's grouped_mm wants it."""
    return to_device(torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32), device)


def refusal(device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> str | None:
    """The reason why torch's grouped_mm cannot take operands of ``widths`` (K, N); None if it can."""
    if dtype not in _GROUPED_DTYPES:
        return f"torch's grouped_mm does not take {dtype}"
    if device.type != "cpu" and dtype is not torch.bfloat16:
        return f"torch's grouped_mm of {dtype} waits for the device, and makes one product per group"
    step = _ALIGN_BYTES // dtype.itemsize
    if any(width % step for width in widths):
        return f"widths {tuple(widths)} in {dtype} are not multiples of {_ALIGN_BYTES} bytes"
    return None

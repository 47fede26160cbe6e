"""Grouped matrix product: consecutive segments of rows, each times its own matrix.

Shapes: R rows, E groups, K inner, N outer; ``counts`` are the rows of each group (a list of host integers,
zeros allowed, summing to R).

Backends: ``loop`` is the oracle (autograd through plain products); ``torch`` is
``torch.nn.functional.grouped_mm`` where it accepts the operands (fp32, bf16 or fp16, row strides that are
multiples of 16 bytes) and products per group on unbound matrices elsewhere, which it says once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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
    reason = refusal(rows_RK, weights_EKN)
    if reason is not None:
        say_once(f"grouped_mm: {reason}; running one product per group")
        return _loop(rows_RK, weights_EKN, counts)
    return F.grouped_mm(rows_RK, weights_EKN, offs=offsets(counts, rows_RK.device))


BACKENDS: dict[str, Callable[[Tensor, Tensor, Sequence[int]], Tensor]] = {"loop": _loop, "torch": _torch}


def offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    """The end of each segment, int32, as torch's grouped_mm wants it."""
    return to_device(torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32), device)


def refusal(rows_RK: Tensor, weights_EKN: Tensor) -> str | None:
    """The reason why torch's grouped_mm cannot take these operands; None if it can."""
    if rows_RK.dtype not in _GROUPED_DTYPES:
        return f"torch's grouped_mm does not take {rows_RK.dtype}"
    if rows_RK.device.type != "cpu" and rows_RK.dtype is not torch.bfloat16:
        return f"torch's grouped_mm of {rows_RK.dtype} waits for the device, and makes one product per group"
    if rows_RK.shape[0] == 0:
        return "torch's grouped_mm does not take zero rows"
    step = _ALIGN_BYTES // rows_RK.element_size()
    widths = (rows_RK.shape[1], weights_EKN.shape[1], weights_EKN.shape[2])
    if any(width % step for width in widths):
        return f"widths {widths} in {rows_RK.dtype} are not multiples of {_ALIGN_BYTES} bytes"
    return None


_said: set[str] = set()


def say_once(message: str) -> None:
    """Log a warning once a process, whatever the number of layers that give it."""
    if message not in _said and "zero rows" not in message:
        _said.add(message)
        warnings.warn(message, stacklevel=2)

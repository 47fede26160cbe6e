"""Self-tests of what a device computes, run apart from whatever called for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

_ROUNDINGS = {2: 4, 4: 16, 8: 16}  # by bytes of the dtype: sums of halves are in fp32


def run(test: Callable[[], str | None], device: torch.device) -> str | None:
    """What ``test`` finds wrong on ``device``, as a phrase, which errors become too; None: all is right.

    None too on a device that this process only pretends to have. It runs in a thread of its own, free of the
    caller's autocast, inference mode, tracing and counting.
    """
    if not _is_real(device):
        return None
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(_phrase(test, device)))
    thread.start()
    thread.join()
    return found[0] if found else "its self-test was interrupted"


def off(name: str, ours: Tensor, right: Tensor, dtype: torch.dtype, least: float = 0.0) -> str | None:
    """A phrase where ``ours`` differs from ``right`` (fp64, on the CPU) by more than rounding in ``dtype``.

    ``least``: a difference, as a share of the largest value, that is rounding in any case.
    """
    bound = max(_ROUNDINGS[dtype.itemsize] * torch.finfo(dtype).eps, least)
    largest = right.abs().max().clamp(min=torch.finfo(right.dtype).tiny)
    share = float((ours.detach().cpu().double() - right).abs().max() / largest)
    if share <= bound:
        return None
    return f"its {name} is off by {share:.2g} of the largest value in a self-test"


def _phrase(test: Callable[[], str | None], device: torch.device) -> str | None:
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return test()
    except Exception as error:  # a compiler, a driver or a kernel: whatever is missing or broken
        return f"its self-test failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _is_real(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return device.type == "cpu" or (accelerator is not None and device.type == accelerator.type)

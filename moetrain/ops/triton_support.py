"""Whether Triton's kernels can run on a device at all."""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (3, 4)


def device_refusal(device: torch.device) -> str | None:
    """Why no Triton kernel can run on ``device``; None where one may."""
    if device.type == "cpu" and not _interpreted():
        return "Triton needs a GPU (or TRITON_INTERPRET=1, to try it on a CPU)"
    if device.type not in ("cpu", "cuda"):
        return f"the kernels are for NVIDIA's and AMD's GPUs, not {device.type}"
    return _missing()


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

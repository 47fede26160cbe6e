"""Copies from the host to a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """``host`` on ``device``; on an accelerator through pinned memory, and the copy may still be under way.

    Whatever is computed from it on the device's current stream comes after the copy.
    """
    if torch.device(device).type in ("cpu", "meta"):
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)

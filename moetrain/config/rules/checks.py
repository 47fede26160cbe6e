"""Small helpers of the rules."""

from __future__ import annotations

import importlib.util

from moetrain.errors import UserError

_DEVICES = ("auto", "cpu", "cuda")


def check_device(key: str, device: str) -> None:
    """A device that is known and there."""
    if device not in _DEVICES:
        raise UserError(f"{key}={device} is not known; known: {', '.join(_DEVICES)}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"{key}=cuda, but torch {torch.__version__} sees no CUDA device: set {key}=auto or cpu"
            )


def is_installed(package: str) -> bool:
    """A folder of that name beside the user's files is no package: it has no origin."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None

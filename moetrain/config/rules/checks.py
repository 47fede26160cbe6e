"""Small helpers of the rules."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from moetrain.errors import UserError

_DEVICES = ("auto", "cpu", "cuda")


def at_least(section: str, config: Any, low: float, *names: str) -> None:
    """Each of the named keys, unless null, is a finite number of at least ``low``; "" is the root."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= low):
            raise UserError(f"{_key(section, name)}={value} must be {low:g} or more")


def above_zero(section: str, config: Any, *names: str) -> None:
    """Each of the named keys, unless null, is a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{_key(section, name)}={value} must be above 0")


def within(key: str, value: float, low: float, high: float, *, open_low: bool, open_high: bool) -> None:
    """``value`` lies between ``low`` and ``high``; an open end is left out."""
    above = low < value if open_low else low <= value
    below = value < high if open_high else value <= high
    if not (above and below):
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        raise UserError(f"{key}={value} must lie in {left}{low:g}, {high:g}{right}")


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


def _key(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def is_installed(package: str) -> bool:
    """A folder of that name beside the user's files is no package: it has no origin."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None

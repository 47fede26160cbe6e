"""Every number of a config is finite, and of a size that can be computed with: checked before other rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from fnmatch import fnmatchcase

from moetrain.errors import UserError

_INT64 = 2**63 - 1
_INT32 = 2**31 - 1
# The first pattern that fits a key gives its largest value. What is not here may be any 64-bit integer.
_MOST = {
    "model.num_layers": 10_000,
    "model.num_experts": 2**24,
    "model.*": _INT32,
    "router.min_capacity": _INT64,
    "router.salt": _INT64,
    "router.*": 2**24,
    "experts.block": 2**20,
    "data.seq_len": _INT32,
    "train.threads": 4096,
    "train.micro_batch_size": _INT32,
    "train.global_batch_tokens": _INT32,
    "train.sample_tokens": _INT32,
    "max_new_tokens": _INT32,
    "optim.ns_steps": 100,
    "parallel.*": 2**24,
    "verify.*": 2**24,
}


def numbers_fit(cfg: object) -> None:
    """Raises UserError for the first number of ``cfg``, a config of any command, that does not."""
    for key, value in _numbers(cfg, ""):
        if isinstance(value, float):
            if not math.isfinite(value):
                raise UserError(f"{key}={value} must be a finite number")
            continue
        most = next((most for pattern, most in _MOST.items() if fnmatchcase(key, pattern)), _INT64)
        if not -_INT64 <= value <= most:
            bound = f"{most} or less" if value > most else f"{-_INT64} or more"
            raise UserError(f"{key}={_shown(value)} must be {bound}")


def _numbers(value: object, key: str) -> Iterator[tuple[str, int | float]]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _numbers(part, f"{key}.{i}")
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _numbers(part, f"{key}.{name}")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _numbers(getattr(value, field.name), f"{key}.{field.name}" if key else field.name)


def _shown(value: int) -> str:
    """At most 40 digits, counted without printing: Python refuses to print a very long number."""
    digits = int(abs(value).bit_length() * math.log10(2))
    return str(value) if digits < 40 else f"a number of {digits + 1} digits or so"

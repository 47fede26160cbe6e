"""How a GGUF file of Llama says that positions are scaled, in the words of transformers.

Two ways: a linear factor in the metadata, or ``rope_freqs.weight``, what each frequency is divided by, in
which llama.cpp's converter writes Llama 3.1's scaling with all its numbers worked in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moetrain.models.rope import rope_table
from moetrain.models.rope_options import RopeKind, RopeScaling

_LOW, _HIGH = 1.0, 4.0  # which the converter takes where a config does not say others
_ORIGINAL = 8192  # likewise
_TOLERANCE = 1e-5


def linear_factor(metadata: Mapping[str, Any]) -> float:
    """1.0 for unscaled positions, as llama.cpp reads them. Raises ValueError for any other scaling.

    Without a type a factor means linear scaling; an older key stands for it where it is missing; 0 is 1.
    """
    kind = metadata.get("llama.rope.scaling.type", "linear")
    if kind == "none":
        return 1.0
    if kind != "linear":
        raise ValueError(f"llama.rope.scaling.type={kind!r} is not supported: none and linear are")
    key = "llama.rope.scaling.factor"
    factor = metadata.get(key, metadata.get("llama.rope.scale_linear", 0.0))
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
        raise ValueError(f"{key}={factor!r} is no number")
    if factor and factor < 1:
        raise ValueError(f"{key}={factor} must be 1 or more")
    return float(factor) or 1.0


def llama3_scaling(divisors_h: Tensor, theta: float, stated: object) -> dict[str, Any] | None:
    """transformers' words for ``divisors_h``, of which each divides one frequency; None where all are 1.

    ``stated``: the original length, where the file says it. Raises ValueError for divisors that are not
    Llama 3.1's for any factor.
    """
    divisors = divisors_h.double()
    if not bool((divisors.isfinite() & (divisors >= 1)).all()):
        raise ValueError("rope_freqs.weight holds numbers that are below 1 or not finite")
    if bool((divisors == 1).all()):
        return None
    width = 2 * len(divisors)
    frequencies = _frequencies(width, theta, RopeScaling())
    for original in _originals(divisors, frequencies, stated):
        turns = frequencies * original / (2 * math.pi)
        kept = ((turns - _LOW) / (_HIGH - _LOW)).clamp(0, 1)
        last = int(kept.argmin())
        share = float((1 / divisors[last] - kept[last]) / (1 - kept[last])) if kept[last] < 1 else 0.0
        if not 0 < share < 1:
            continue
        factor = float(f"{1 / share:.6g}")  # as it was before fp32 rounded the divisors
        scaling = RopeScaling(RopeKind.llama3, factor, original, _LOW, _HIGH)
        expected = frequencies / _frequencies(width, theta, scaling)
        if torch.allclose(expected, divisors, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    raise ValueError("rope_freqs.weight is not Llama 3.1's scaling for any factor, and no other is supported")


def _frequencies(width: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Radians a position, by the very table of the model: the angle at position 1 is below pi."""
    rope = rope_table(torch.ones(1, 1, dtype=torch.long), width, theta, torch.float64, scaling)
    return torch.atan2(rope.sin_BS1h.reshape(-1), rope.cos_BS1H.reshape(-1)[: width // 2])


def _originals(divisors: Tensor, frequencies: Tensor, stated: object) -> list[int]:
    """Lengths to try: what the file says, what the converter takes, and what a divisor between tells."""
    found = [stated] if type(stated) is int and stated > 0 else []
    found.append(_ORIGINAL)
    full = 1 / float(divisors.max())
    for divisor, frequency in zip(divisors.tolist(), frequencies.tolist(), strict=True):
        kept = (1 / divisor - full) / (1 - full)
        if 0 < kept < 1:
            found.append(round((_LOW + kept * (_HIGH - _LOW)) * 2 * math.pi / frequency))
    return found

"""Whole numbers, for advice in error messages."""

from __future__ import annotations

import math


def divisor_near(number: int, wanted: int) -> int:
    """The divisor of ``number``, 1 to 2^31, nearest to ``wanted`` (in ratio). Tries up to its square root."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    return min(divisors, key=lambda d: abs(math.log(d / max(wanted, 1))))

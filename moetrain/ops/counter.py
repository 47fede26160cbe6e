"""Counter-based random numbers: element ``i`` of a stream is a function of (key, i) alone.

Every operation is exact or correctly rounded (integers; IEEE +, -, *, / and sqrt in fp64, one at a time), so
a value has the same bits on every device, in every block and under every number of threads. ``log`` and
``cos`` of a library promise no such thing.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: splitmix64's increment
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB

# Wichura (1988), "The percentage points of the normal distribution", AS 241, routine PPND7: about 7 digits.
_CENTRE = (
    (3.3871327179, 50.434271938, 159.29113202, 59.109374720),
    (1.0, 17.895169469, 78.757757664, 67.187563600),
)
_TAIL = (1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103), (1.0, 0.73700164250, 0.12021132975)
_FAR_TAIL = (6.6579051150, 3.0812263860, 0.42868294337, 0.017337203997), (1.0, 0.24197894225, 0.012258202635)


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (arithmetic wraps; shifts are made logical by masks)."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def stream_key(seed: int, name: str) -> int:
    """The key of a named stream, as int64."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(key: int, indices: Tensor) -> Tensor:
    """Values in (0, 1), fp64, of the elements ``indices`` (int64, any shape) of the stream ``key``."""
    # 52 bits and a half: never 0 or 1, and 1 - p is exact.
    bits = (mix(mix(indices) ^ key) >> 12) & 0xFFFFFFFFFFFFF
    return (bits.to(torch.float64) + 0.5) * 2.0**-52


def logarithm(x: Tensor) -> Tensor:
    """The natural logarithm of positive fp64 numbers to 1e-11, by log m = 2 artanh((m - 1) / (m + 1))."""
    mantissa, exponent = torch.frexp(x)  # exact; mantissa in [0.5, 1)
    low = mantissa < math.sqrt(0.5)
    mantissa = torch.where(low, mantissa * 2.0, mantissa)
    exponent = exponent - low.to(exponent.dtype)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _polynomial(s * s, tuple(2.0 / odd for odd in range(1, 14, 2)))
    return s * series + exponent.to(torch.float64) * math.log(2.0)


def normal(key: int, indices: Tensor) -> Tensor:
    """Standard normal values, fp64, of the elements ``indices`` (int64, any shape) of the stream ``key``."""
    p = uniform(key, indices)
    q = p - 0.5
    r = 0.180625 - q * q
    z = q * _ratio(r, _CENTRE)
    tail = (r < 0).nonzero(as_tuple=True)
    p, q = p[tail], q[tail]
    r = (-logarithm(torch.minimum(p, 1.0 - p))).sqrt()
    far = torch.where(r > 5.0, _ratio(r - 5.0, _FAR_TAIL), _ratio(r - 1.6, _TAIL))
    z[tail] = torch.where(q < 0, -far, far)
    return z


def _ratio(x: Tensor, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    over, under = (_polynomial(x, part) for part in coefficients)
    return over / under


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's rule, product and sum apart: a fused multiply-add would round once instead of twice."""
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x
        value = value + coefficient
    return value

"""Expert activations on tiles in registers, forward and backward, chosen when a kernel is compiled.

``swiglu_clamped`` is GPT-OSS's (arXiv:2508.10925): the gate clamped above, the linear half clamped on both
sides and shifted by one. Comparisons are written so that a NaN stays one, as torch's own do.
"""

from __future__ import annotations

import triton
import triton.language as tl

GATED = ("swiglu", "geglu", "reglu", "drelu", "swiglu_clamped", "geglu_tanh")
PLAIN = ("gelu", "relu", "relu2", "silu")

_ALPHA = tl.constexpr(1.702)
_LIMIT = tl.constexpr(7.0)
_TWICE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_TWICE_CUBE = tl.constexpr(0.07135481627260025)  # 0.044715 times that


def is_gated(name: str) -> bool:
    """Whether the activation has two pre-activations, gate and up.

    Raises:
        ValueError: The name is not of ``GATED`` or ``PLAIN``.
    """
    if name not in GATED + PLAIN:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(GATED + PLAIN)}")
    return name in GATED


@triton.jit
def activate(gate, up, NAME: tl.constexpr):
    """h of fp32 tiles; ``gate`` is not read where the activation is a plain one."""
    if NAME == "swiglu_clamped":
        gate = tl.where(gate > _LIMIT, _LIMIT, gate)
        up = tl.where(up > _LIMIT, _LIMIT, tl.where(up < -_LIMIT, -_LIMIT, up))
        h = gate * tl.sigmoid(gate * _ALPHA) * (up + 1)
    elif NAME == "swiglu":
        h = gate * tl.sigmoid(gate) * up
    elif NAME == "geglu":
        h = _gelu(gate) * up
    elif NAME == "geglu_tanh":
        h = gate * _tanh_share(gate) * up
    elif NAME == "reglu":
        h = tl.where(gate <= 0, 0.0, gate) * up
    elif NAME == "drelu":
        h = tl.where(gate <= 0, 0.0, gate) * tl.where(up <= 0, 0.0, up)
    elif NAME == "gelu":
        h = _gelu(up)
    elif NAME == "silu":
        h = up * tl.sigmoid(up)
    elif NAME == "relu2":
        r = tl.where(up <= 0, 0.0, up)
        h = r * r
    else:
        tl.static_assert(NAME == "relu")
        h = tl.where(up <= 0, 0.0, up)
    return h


@triton.jit
def activate_backward(dh, gate, up, NAME: tl.constexpr):
    """(d gate, d up) of fp32 tiles; a plain activation's d gate is its d up."""
    if NAME == "swiglu_clamped":
        g = tl.where(gate > _LIMIT, _LIMIT, gate)
        u = tl.where(up > _LIMIT, _LIMIT, tl.where(up < -_LIMIT, -_LIMIT, up))
        s = tl.sigmoid(g * _ALPHA)
        dgate = tl.where(gate > _LIMIT, 0.0, dh * (u + 1) * s * (1 + g * _ALPHA * (1 - s)))
        dup = tl.where((up > _LIMIT) | (up < -_LIMIT), 0.0, dh * g * s)
    elif NAME == "swiglu":
        s = tl.sigmoid(gate)
        dgate = dh * up * s * (1 + gate * (1 - s))
        dup = dh * gate * s
    elif NAME == "geglu":
        dgate = dh * up * _gelu_slope(gate)
        dup = dh * _gelu(gate)
    elif NAME == "geglu_tanh":
        s = _tanh_share(gate)
        dgate = dh * up * s * (1 + gate * (1 - s) * (_TWICE + _TWICE_CUBE * 3 * gate * gate))
        dup = dh * gate * s
    elif NAME == "reglu":
        dgate = tl.where(gate <= 0, 0.0, dh * up)
        dup = dh * tl.where(gate <= 0, 0.0, gate)
    elif NAME == "drelu":
        dgate = tl.where(gate <= 0, 0.0, dh * tl.where(up <= 0, 0.0, up))
        dup = tl.where(up <= 0, 0.0, dh * tl.where(gate <= 0, 0.0, gate))
    elif NAME == "gelu":
        dup = dh * _gelu_slope(up)
        dgate = dup
    elif NAME == "silu":
        s = tl.sigmoid(up)
        dup = dh * s * (1 + up * (1 - s))
        dgate = dup
    elif NAME == "relu2":
        dup = dh * 2 * tl.where(up <= 0, 0.0, up)
        dgate = dup
    else:
        tl.static_assert(NAME == "relu")
        dup = tl.where(up <= 0, 0.0, dh)
        dgate = dup
    return dgate, dup


@triton.jit
def _gelu(x):
    return x * 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _tanh_share(x):
    """(1 + tanh(u)) / 2 = sigmoid(2 u) of u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return tl.sigmoid(x * (_TWICE + _TWICE_CUBE * x * x))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1 + tl.math.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)

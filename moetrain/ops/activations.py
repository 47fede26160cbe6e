"""Expert activations: forward, and the backward written out so that only the pre-activation is kept.

A gated activation has two pre-activations, gate and up; a plain one has ``up`` only and no gate. ``drelu``
(Song et al. 2024, arXiv:2406.05955) is relu(gate) relu(up): it activates up too, which the others do not.
``swiglu_clamped`` (OpenAI 2025, arXiv:2508.10925) is g sigmoid(1.702 g) (u + 1), with g the gate clamped to
at most 7 and u up clamped to [-7, 7]. ``geglu_tanh`` has GELU by its tanh formula (Hendrycks and Gimpel 2016,
arXiv:1606.08415).
Shapes: n rows, F hidden, P = 2F (gate columns, then up columns) or F.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GATED = ("swiglu", "geglu", "reglu", "drelu", "swiglu_clamped", "geglu_tanh")
PLAIN = ("gelu", "relu", "relu2", "silu")
ACTIVATIONS = GATED + PLAIN
ALPHA, LIMIT = 1.702, 7.0  # of swiglu_clamped
aten = torch.ops.aten


def is_gated(name: str) -> bool:
    """Whether the activation multiplies a gate by an up projection."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return name in GATED


def gate_and_up(z_nP: Tensor, name: str) -> tuple[Tensor | None, Tensor]:
    """Views of the gate columns (None where the activation has no gate) and the up columns."""
    if not is_gated(name):
        return None, z_nP
    gate_nF, up_nF = z_nP.chunk(2, dim=-1)
    return gate_nF, up_nF


def activate(gate_nF: Tensor | None, up_nF: Tensor, name: str) -> Tensor:
    """h [n, F] of the pre-activations; differentiable by autograd (the oracle's path)."""
    return _unary(up_nF, name) if gate_nF is None else _unary(gate_nF, name) * _up(up_nF, name)


def activate_again(gate_nF: Tensor | None, up_nF: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(h, the activated gate or h itself): what a backward pass computes anew and both uses of it share."""
    if gate_nF is None:
        h_nF = _unary(up_nF, name)
        return h_nF, h_nF
    active_nF = _unary(gate_nF, name)
    return active_nF * _up(up_nF, name), active_nF


def activate_backward(
    dh_nF: Tensor,
    gate_nF: Tensor | None,
    up_nF: Tensor,
    active_nF: Tensor,
    name: str,
    dgate_nF: Tensor | None,
    dup_nF: Tensor,
) -> None:
    """Write d loss / d gate into ``dgate_nF`` and d loss / d up into ``dup_nF``.

    ``dh_nF`` is d loss / d h, and is overwritten. ``active_nF`` is of :func:`activate_again`.
    """
    if gate_nF is None or dgate_nF is None:
        _unary_backward(dh_nF, up_nF, name, dup_nF)
        return
    torch.mul(dh_nF, active_nF, out=dup_nF)
    if name == "drelu":
        aten.threshold_backward.grad_input(dup_nF, up_nF, 0, grad_input=dup_nF)
    elif name == "swiglu_clamped":
        dup_nF.masked_fill_(up_nF.abs() > LIMIT, 0)
    _unary_backward(dh_nF.mul_(_up(up_nF, name)), gate_nF, name, dgate_nF)


def _up(up_nF: Tensor, name: str) -> Tensor:
    if name == "swiglu_clamped":
        return torch.where(up_nF.abs() > LIMIT, LIMIT * up_nF.sign(), up_nF) + 1
    return F.relu(up_nF) if name == "drelu" else up_nF


def _unary(x: Tensor, name: str) -> Tensor:
    if name in ("swiglu", "silu"):
        return F.silu(x)
    if name in ("geglu", "gelu"):
        return F.gelu(x)
    if name == "geglu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "swiglu_clamped":
        x = _capped(x)
        return x * torch.sigmoid(ALPHA * x)
    r = F.relu(x)
    return r * r if name == "relu2" else r


def _unary_backward(grad: Tensor, x: Tensor, name: str, out: Tensor) -> None:
    if name in ("swiglu", "silu"):
        aten.silu_backward.grad_input(grad, x, grad_input=out)
    elif name in ("geglu", "gelu"):
        aten.gelu_backward.grad_input(grad, x, grad_input=out)
    elif name == "geglu_tanh":
        aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)
    elif name == "relu2":
        torch.mul(grad, 2 * F.relu(x), out=out)
    elif name == "swiglu_clamped":
        capped = ALPHA * _capped(x)
        s = torch.sigmoid(capped)
        torch.mul(grad, s.mul_(capped.mul_(1 - s).add_(1)), out=out)
        out.masked_fill_(x > LIMIT, 0)
    else:
        aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)


def _capped(x: Tensor) -> Tensor:
    """At most the limit; not by clamp, whose slope at the limit itself is 1 before torch 2.15 and 0 since."""
    return torch.where(x > LIMIT, LIMIT, x)

"""Expert activations: forward, and the backward written out so that only the pre-activation is kept.

Shapes: n rows, F hidden, P = 2F (gated: gate columns, then up columns) or F.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GATED = ("swiglu", "geglu", "reglu")
PLAIN = ("gelu", "relu", "relu2", "silu")
ACTIVATIONS = GATED + PLAIN
aten = torch.ops.aten


def is_gated(name: str) -> bool:
    """Whether the activation multiplies a gate by an up projection."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return name in GATED


def activate(z_nP: Tensor, name: str) -> Tensor:
    """h [n, F] of the pre-activation; differentiable by autograd (the oracle's path)."""
    if is_gated(name):
        gate_nF, up_nF = z_nP.chunk(2, dim=-1)
        return _unary(gate_nF, name) * up_nF
    return _unary(z_nP, name)


def activate_again(z_nP: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(h, the activated gate or h itself): what a backward pass computes anew and both uses of it share."""
    if not is_gated(name):
        h_nF = _unary(z_nP, name)
        return h_nF, h_nF
    gate_nF, up_nF = z_nP.chunk(2, dim=-1)
    active_nF = _unary(gate_nF, name)
    return active_nF * up_nF, active_nF


def activate_backward(dh_nF: Tensor, z_nP: Tensor, active_nF: Tensor, name: str, dz_nP: Tensor) -> None:
    """Write d loss / d z into ``dz_nP``, given d loss / d h, which is used up.

    ``active_nF`` is of :func:`activate_again`.
    """
    if not is_gated(name):
        _unary_backward(dh_nF, z_nP, name, dz_nP)
        return
    gate_nF, up_nF = z_nP.chunk(2, dim=-1)
    dgate_nF, dup_nF = dz_nP.chunk(2, dim=-1)
    torch.mul(dh_nF, active_nF, out=dup_nF)
    _unary_backward(dh_nF.mul_(up_nF), gate_nF, name, dgate_nF)


def _unary(x: Tensor, name: str) -> Tensor:
    if name in ("swiglu", "silu"):
        return F.silu(x)
    if name in ("geglu", "gelu"):
        return F.gelu(x)
    r = F.relu(x)
    return r * r if name == "relu2" else r


def _unary_backward(grad: Tensor, x: Tensor, name: str, out: Tensor) -> None:
    if name in ("swiglu", "silu"):
        aten.silu_backward.grad_input(grad, x, grad_input=out)
    elif name in ("geglu", "gelu"):
        aten.gelu_backward.grad_input(grad, x, grad_input=out)
    elif name == "relu2":
        torch.mul(grad, 2 * F.relu(x), out=out)
    else:
        aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)

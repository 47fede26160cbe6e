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
    """Write d loss / d z into ``dz_nP``, given d loss / d h; ``active_nF`` is of :func:`activate_again`."""
    if not is_gated(name):
        dz_nP.copy_(_unary_backward(dh_nF, z_nP, name))
        return
    gate_nF, up_nF = z_nP.chunk(2, dim=-1)
    dgate_nF, dup_nF = dz_nP.chunk(2, dim=-1)
    torch.mul(dh_nF, active_nF, out=dup_nF)
    dgate_nF.copy_(_unary_backward(dh_nF * up_nF, gate_nF, name))


def _unary(x: Tensor, name: str) -> Tensor:
    if name in ("swiglu", "silu"):
        return F.silu(x)
    if name in ("geglu", "gelu"):
        return F.gelu(x)
    r = F.relu(x)
    return r * r if name == "relu2" else r


def _unary_backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    if name in ("swiglu", "silu"):
        return aten.silu_backward(grad, x)  # type: ignore[no-any-return]
    if name in ("geglu", "gelu"):
        return aten.gelu_backward(grad, x)  # type: ignore[no-any-return]
    if name == "relu2":
        return grad * (2 * F.relu(x))
    return aten.threshold_backward(grad, x, 0)  # type: ignore[no-any-return]

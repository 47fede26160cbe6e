"""Expert activations in plain torch: what kernels/activations.py computes.

Shapes: n rows, F hidden, P = 2F (gate columns, then up columns) or F.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GATED = ("swiglu", "geglu", "reglu", "drelu", "swiglu_clamped", "geglu_tanh")
PLAIN = ("gelu", "relu", "relu2", "silu")
ALPHA, LIMIT = 1.702, 7.0  # of GPT-OSS


def activate(z_nP: Tensor, name: str) -> Tensor:
    """h [n, F] of pre-activations z [n, P], differentiable.

    Raises:
        ValueError: The name is not of ``GATED`` or ``PLAIN``.
    """
    if name in PLAIN:
        return _unary(z_nP, name)
    gate_nF, up_nF = z_nP.chunk(2, dim=-1)
    if name == "swiglu_clamped":
        # Not clamp, whose slope at the limit itself is 1 before torch 2.15 and 0 since.
        gate_nF = torch.where(gate_nF > LIMIT, LIMIT, gate_nF)
        up_nF = torch.where(up_nF.abs() > LIMIT, LIMIT * up_nF.sign(), up_nF)
        return gate_nF * torch.sigmoid(ALPHA * gate_nF) * (up_nF + 1)
    if name == "drelu":
        return F.relu(gate_nF) * F.relu(up_nF)
    if name == "geglu_tanh":
        return F.gelu(gate_nF, approximate="tanh") * up_nF
    return _unary(gate_nF, {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}.get(name, name)) * up_nF


def _unary(x_nF: Tensor, name: str) -> Tensor:
    if name == "silu":
        return F.silu(x_nF)
    if name == "gelu":
        return F.gelu(x_nF)
    if name == "relu":
        return F.relu(x_nF)
    if name == "relu2":
        return F.relu(x_nF).square()
    raise ValueError(f"unknown activation {name!r}; known: {', '.join(GATED + PLAIN)}")

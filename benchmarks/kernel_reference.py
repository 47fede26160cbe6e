"""What the experts' kernels compute, in fp64 with a bound of their error; tests hold it to ``kernels/twins``.

Operands are taken as the kernel reads them, and rounded where it stores.

Shapes: T tokens, D model, F hidden, P = 2F, E experts, k experts a token, N = T k, R block-aligned rows.
"""

from __future__ import annotations

import torch
from bounded import Bounded, silu, silu_slope
from kernel_problem import Problem
from torch import Tensor


def products(p: Problem, left: Bounded, w_EKN: Tensor) -> Bounded:
    """Each expert's rows times its matrix; zero elsewhere."""
    shape = (left.value.shape[0], w_EKN.shape[2])
    out = Bounded(*(torch.zeros(shape, dtype=torch.float64, device=w_EKN.device) for _ in range(2)))
    for expert, rows in p.experts():
        one = left[rows] @ Bounded.exact(w_EKN[expert])
        out.value[rows], out.error[rows] = one.value, one.error
    return out


def gradients(p: Problem, left: Bounded, right: Bounded) -> Bounded:
    """[E, K, N]: left^T @ right over each expert's rows."""
    shape = (p.shape.experts, left.value.shape[1], right.value.shape[1])
    out = Bounded(*(torch.zeros(shape, dtype=torch.float64, device=left.value.device) for _ in range(2)))
    for expert, rows in p.experts():
        one = left[rows].t @ right[rows]
        out.value[expert], out.error[expert] = one.value, one.error
    return out.rounded(p.dtype)


def _halves(z: Bounded) -> tuple[Bounded, Bounded]:
    width = z.value.shape[1] // 2
    at = (slice(None), slice(width)), (slice(None), slice(width, None))
    return Bounded(z.value[at[0]], z.error[at[0]]), Bounded(z.value[at[1]], z.error[at[1]])


def _weights(p: Problem) -> Bounded:
    return Bounded.exact(p.weights_R[:, None])


def hidden_rows(p: Problem, z: Bounded) -> Bounded:
    """h [R, F], with the routing weight."""
    gate, value = _halves(z)
    return (silu(gate) * value * _weights(p)).rounded(p.dtype)


def forward_reference(p: Problem) -> tuple[Bounded, Bounded, Bounded]:
    """(out, z, h)."""
    z = products(p, p.gathered(), p.w_up_EDP).rounded(p.dtype)
    h = hidden_rows(p, z)
    return products(p, h, p.w_down_EFD).rounded(p.dtype), z, h


def hidden_gradient_reference(p: Problem, dh: Bounded, z: Bounded) -> tuple[Bounded, Bounded]:
    """(dz, dweights [R])."""
    gate, value = _halves(z)
    dweights = (dh * (silu(gate) * value)).sum(1)
    scaled = dh * _weights(p)
    dgate, dvalue = scaled * value * silu_slope(gate), scaled * silu(gate)
    both = [torch.cat(pair, 1) for pair in ((dgate.value, dvalue.value), (dgate.error, dvalue.error))]
    return Bounded(*both).rounded(p.dtype), dweights


def backward_reference(p: Problem, z: Bounded, h: Bounded) -> list[Bounded]:
    """[dx, dweights, dw_up, dw_down]."""
    dout = Bounded.exact(p.dout_RD)
    dz, dweights = hidden_gradient_reference(p, products(p, dout, p.w_down_EFD.mT), z)
    dx = products(p, dz, p.w_up_EDP.mT).rounded(p.dtype)
    return [dx, dweights, gradients(p, p.gathered(), dz), gradients(p, h, dout)]

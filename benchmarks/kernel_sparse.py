"""Block-sparse products and activations of the dropless layer, kernel by kernel, beside torch's own ways.

Shapes: T tokens, D model, F hidden, P = 2F, E experts, k experts a token, N = T k, R block-aligned rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bounded import Bounded
from kernel_problem import ACTIVATION, Problem, Unit, ends, flops, random_rows
from kernel_reference import gradients, hidden_gradient_reference, hidden_rows, products
from torch import Tensor

from moetrain.kernels.block_sparse import activation as block_activation
from moetrain.kernels.block_sparse import experts as block_sparse
from moetrain.kernels.block_sparse.dds import dds
from moetrain.kernels.block_sparse.dsd import dsd
from moetrain.kernels.block_sparse.sdd import sdd
from moetrain.ops.activations import activate, activate_backward, gate_and_up


def topologies(p: Problem) -> block_sparse.Topologies:
    return block_sparse.topologies(
        p.meta.block_expert_B, p.shape.experts, p.shape.d_ff, p.meta.block, ACTIVATION
    )


def stored_products(p: Problem) -> Unit:
    x, topology = random_rows(p, p.shape.d_model, 5), topologies(p).up
    return Unit(
        "SDD", flops(p, 2 * p.shape.d_ff), lambda: [sdd(x, p.w_up_EDP, topology)],
        lambda: [products(p, Bounded.exact(x), p.w_up_EDP).rounded(p.dtype)],
        {"grouped_mm": lambda: [F.grouped_mm(x, p.w_up_EDP, offs=ends(p))]},
    )  # fmt: skip


def kept_products(p: Problem) -> Unit:
    h, topology = random_rows(p, p.shape.d_ff, 6), topologies(p).down
    return Unit(
        "DSD", flops(p, p.shape.d_ff), lambda: [dsd(h, topology, p.w_down_EFD)],
        lambda: [products(p, Bounded.exact(h), p.w_down_EFD).rounded(p.dtype)],
        {"grouped_mm": lambda: [F.grouped_mm(h, p.w_down_EFD, offs=ends(p))]},
    )  # fmt: skip


def transposed_products(p: Problem) -> Unit:
    x, dz, topology = (
        random_rows(p, p.shape.d_model, 7),
        random_rows(p, 2 * p.shape.d_ff, 8),
        topologies(p).up,
    )
    return Unit(
        "DDS", flops(p, 2 * p.shape.d_ff), lambda: [dds(x.mT, dz, topology)],
        lambda: [gradients(p, Bounded.exact(x), Bounded.exact(dz))],
        {"grouped_mm": lambda: [F.grouped_mm(x.t(), dz, offs=ends(p))]},
    )  # fmt: skip


def activation(p: Problem) -> Unit:
    z = random_rows(p, 2 * p.shape.d_ff, 9)

    def by_torch() -> list[Tensor]:
        return [activate(*gate_and_up(z, ACTIVATION), ACTIVATION) * p.weights_R[:, None].to(p.dtype)]

    return Unit(
        "activation", 0,
        lambda: [block_activation.weighted_activation(z, p.weights_R, p.meta.block_expert_B, ACTIVATION)],
        lambda: [hidden_rows(p, Bounded.exact(z))], {"torch": by_torch},
    )  # fmt: skip


def activation_gradient(p: Problem) -> Unit:
    z, dh = random_rows(p, 2 * p.shape.d_ff, 10), random_rows(p, p.shape.d_ff, 11)

    def ours() -> list[Tensor]:
        dz, h, dweights = block_activation.weighted_activation_backward(
            dh, z, p.weights_R, p.meta.block_expert_B, ACTIVATION
        )
        return [dz, dweights, h]

    def reference() -> list[Bounded]:
        read = Bounded.exact(z)
        return [*hidden_gradient_reference(p, Bounded.exact(dh), read), hidden_rows(p, read)]

    others = {"torch": lambda: torch_activation_gradient(p, dh, z)}
    return Unit("activation backward", 0, ours, reference, others)


def torch_activation_gradient(p: Problem, dh: Tensor, z: Tensor) -> list[Tensor]:
    gate, value = gate_and_up(z, ACTIVATION)
    assert gate is not None
    active = F.silu(gate)
    weights, dz = p.weights_R.to(p.dtype)[:, None], torch.empty_like(z)
    h = active * value
    dweights = torch.linalg.vecdot(dh.float(), h.float())
    activate_backward(dh * weights, gate, value, active, ACTIVATION, *gate_and_up(dz, ACTIVATION))
    return [dz, dweights, h * weights]

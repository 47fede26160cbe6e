"""The experts' feed-forward by grouped kernels: whole, and kernel by kernel, beside torch's own ways.

Shapes: T tokens, D model, F hidden, P = 2F, E experts, k experts a token, N = T k, R block-aligned rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bounded import Bounded
from kernel_problem import ACTIVATION, Problem, Unit, ends, flops, random_rows
from kernel_reference import (
    backward_reference,
    forward_reference,
    gradients,
    hidden_gradient_reference,
    hidden_rows,
    products,
)
from kernel_sparse import topologies, torch_activation_gradient
from torch import Tensor

from moetrain.kernels import grouped
from moetrain.kernels.block_sparse import experts as block_sparse
from moetrain.kernels.grouped.hidden_gradient import hidden_gradient
from moetrain.kernels.grouped.product import product
from moetrain.kernels.grouped.up import up
from moetrain.kernels.grouped.weight_gradient import weight_gradient
from moetrain.ops.activations import activate, gate_and_up
from moetrain.ops.experts import grouped as torch_grouped
from moetrain.ops.experts.operands import Operands
from moetrain.ops.gather_sum import gather_rows


def _operands(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return p.source_XD, p.rows.ids_R, p.weights_R, p.w_up_EDP, p.w_down_EFD


def _for_torch(p: Problem) -> Operands:
    return Operands(*_operands(p), p.rows.segments, ACTIVATION)


def _looped(p: Problem, source_XD: Tensor, weights_R: Tensor, w_up_EDP: Tensor, w_down_EFD: Tensor) -> Tensor:
    out_RD = source_XD.new_zeros(len(p.rows.ids_R), source_XD.shape[1])
    for expert, rows in p.experts():
        z_nP = source_XD[p.rows.ids_R[rows]] @ w_up_EDP[expert]
        h_nF = activate(*gate_and_up(z_nP, ACTIVATION), ACTIVATION) * weights_R[rows, None].to(
            source_XD.dtype
        )
        out_RD[rows] = h_nF @ w_down_EFD[expert]
    return out_RD


def feed_forward(p: Problem) -> Unit:
    def ours() -> list[Tensor]:
        out, z = grouped.forward(p.source_XD, p.meta, p.weights_R, p.w_up_EDP, p.w_down_EFD, ACTIVATION)
        assert z is not None
        return [out, z]

    return Unit(
        "forward", 3 * flops(p, p.shape.d_ff), ours, lambda: list(forward_reference(p)[:2]),
        {
            "block-sparse": lambda: list(block_sparse.forward(*_operands(p), topologies(p), ACTIVATION)),
            "grouped_mm": lambda: [torch_grouped.forward(_for_torch(p), keep=True)[0]],
            "loop": lambda: [_looped(p, p.source_XD, p.weights_R, p.w_up_EDP, p.w_down_EFD)],
        },
    )  # fmt: skip


def feed_forward_and_backward(p: Problem) -> Unit:
    def ours() -> list[Tensor]:
        out, z = grouped.forward(p.source_XD, p.meta, p.weights_R, p.w_up_EDP, p.w_down_EFD, ACTIVATION)
        operands = (p.source_XD, p.meta, p.weights_R, p.w_up_EDP, p.w_down_EFD)
        return [out, *grouped.backward(p.dout_RD, *operands, z, ACTIVATION)]

    def by_blocks() -> list[Tensor]:
        topology = topologies(p)
        out, z = block_sparse.forward(*_operands(p), topology, ACTIVATION)
        return [out, *block_sparse.backward(p.dout_RD, *_operands(p), z, topology, ACTIVATION)]

    def by_torch() -> list[Tensor]:
        out, kept = torch_grouped.forward(_for_torch(p), keep=True)
        return [out, *torch_grouped.backward(p.dout_RD, _for_torch(p), kept)]

    def by_loop() -> list[Tensor]:
        given = (p.source_XD, p.weights_R, p.w_up_EDP, p.w_down_EFD)
        leaves = [t.detach().requires_grad_() for t in given]
        out = _looped(p, *leaves)
        return [out, *torch.autograd.grad(out, leaves, p.dout_RD)]

    def reference() -> list[Bounded]:
        out, z, h = forward_reference(p)
        return [out, *backward_reference(p, z, h)]

    others = {"block-sparse": by_blocks, "grouped_mm": by_torch, "loop": by_loop}
    return Unit("forward + backward", 9 * flops(p, p.shape.d_ff), ours, reference, others)


def up_projection(p: Problem) -> Unit:
    z = p.source_XD.new_empty(len(p.rows.ids_R), 2 * p.shape.d_ff)
    h = p.source_XD.new_empty(len(p.rows.ids_R), p.shape.d_ff)

    def ours() -> list[Tensor]:
        up(p.source_XD, p.meta, p.weights_R, p.w_up_EDP, ACTIVATION, z, h)
        return [z, h]

    def by_torch() -> list[Tensor]:
        made = F.grouped_mm(gather_rows(p.source_XD, p.rows.ids_R), p.w_up_EDP, offs=ends(p))
        return [activate(*gate_and_up(made, ACTIVATION), ACTIVATION) * p.weights_R[:, None].to(p.dtype)]

    return Unit(
        "up",
        flops(p, 2 * p.shape.d_ff),
        ours,
        lambda: list(forward_reference(p)[1:]),
        {"grouped_mm": by_torch},
    )


def down_projection(p: Problem) -> Unit:
    h, out = random_rows(p, p.shape.d_ff, 1), torch.empty_like(p.dout_RD)

    def ours() -> list[Tensor]:
        product(h, p.meta, p.w_down_EFD, out)
        return [out]

    return Unit(
        "down", flops(p, p.shape.d_ff), ours,
        lambda: [products(p, Bounded.exact(h), p.w_down_EFD).rounded(p.dtype)],
        {"grouped_mm": lambda: [F.grouped_mm(h, p.w_down_EFD, offs=ends(p))]},
    )  # fmt: skip


def hidden(p: Problem) -> Unit:
    z = random_rows(p, 2 * p.shape.d_ff, 2)
    dz, h = torch.empty_like(z), z.new_empty(len(z), p.shape.d_ff)

    def ours() -> list[Tensor]:
        dweights = hidden_gradient(
            p.dout_RD, p.meta, p.weights_R, p.w_down_EFD, z, ACTIVATION, dz, h, gathered=False
        )
        return [dz, dweights, h]

    def by_torch() -> list[Tensor]:
        dh = F.grouped_mm(p.dout_RD, p.w_down_EFD.mT, offs=ends(p))
        return torch_activation_gradient(p, dh, z)

    def reference() -> list[Bounded]:
        read = Bounded.exact(z)
        dh = products(p, Bounded.exact(p.dout_RD), p.w_down_EFD.mT)
        return [*hidden_gradient_reference(p, dh, read), hidden_rows(p, read)]

    return Unit("hidden gradient", flops(p, p.shape.d_ff), ours, reference, {"grouped_mm": by_torch})


def up_gradient(p: Problem) -> Unit:
    dz, out = random_rows(p, 2 * p.shape.d_ff, 3), torch.empty_like(p.w_up_EDP)

    def ours() -> list[Tensor]:
        weight_gradient(p.source_XD, dz, p.meta, out, (True, False))
        return [out]

    def by_torch() -> list[Tensor]:
        return [F.grouped_mm(gather_rows(p.source_XD, p.rows.ids_R).t(), dz, offs=ends(p))]

    return Unit(
        "gradient of w_up", flops(p, 2 * p.shape.d_ff), ours,
        lambda: [gradients(p, p.gathered(), Bounded.exact(dz))], {"grouped_mm": by_torch},
    )  # fmt: skip


def down_gradient(p: Problem) -> Unit:
    h, out = random_rows(p, p.shape.d_ff, 4), torch.empty_like(p.w_down_EFD)

    def ours() -> list[Tensor]:
        weight_gradient(h, p.dout_RD, p.meta, out)
        return [out]

    return Unit(
        "gradient of w_down", flops(p, p.shape.d_ff), ours,
        lambda: [gradients(p, Bounded.exact(h), Bounded.exact(p.dout_RD))],
        {"grouped_mm": lambda: [F.grouped_mm(h.t(), p.dout_RD, offs=ends(p))]},
    )  # fmt: skip

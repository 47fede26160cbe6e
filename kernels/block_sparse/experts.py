"""The dropless expert layer as block-sparse products (Gale et al. 2022, "MegaBlocks", arXiv:2211.15841).

Shapes: X source rows, D model, R rows in block-aligned expert order (padding: id -1, weight 0), B blocks of
them, E experts, F hidden, P = 2F (gate columns, then up columns) or F.

Rows of an expert have the columns of that expert, and no others: z = SDD(x, w_up), h = weight * act(z), out =
DSD(h, w_down), where the matrices [E, D, P] and [E, F, D] are read as [D, E * P] and [E * F, D] in place. One
SDD computes gate and up columns, so that the gradient of x sums over both in fp32. Kept for backward: the
source, the ids, the weights and z [R, P], or not even z. Rows, activation and weighting are computed anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..activations import is_gated
from ..tiles import arch_of
from .activation import weighted_activation, weighted_activation_backward
from .dds import dds
from .dsd import dsd
from .parts import has_shape
from .sdd import sdd
from .topology import BLOCKS, Topology, expert_topology


@dataclass(frozen=True)
class Topologies:
    """Of z, with P columns an expert, and of h, with F; and the expert of each block of rows, -1 if none."""

    up: Topology
    down: Topology
    experts_B: Tensor


def topologies(experts_B: Tensor, num_experts: int, hidden: int, block: int, activation: str) -> Topologies:
    """The topologies of a batch whose blocks of ``block`` rows belong to ``experts_B``, -1 where to none.

    Waits for nothing on the device. Raises ValueError for an unknown activation, for a ``block`` without
    kernels and on a device without.
    """
    gated = is_gated(activation)
    width = 16 if arch_of(experts_B.device).interpreted else _width(hidden)
    down = expert_topology(experts_B, num_experts, hidden, block, width)
    up = expert_topology(experts_B, num_experts, 2 * hidden, block, width) if gated else down
    return Topologies(up, down, experts_B)


def _width(hidden: int) -> int:
    """The widest block, or the first that an expert's columns fit in."""
    return next((width for width in BLOCKS if hidden <= width), BLOCKS[-1])


def forward(
    source_XD: Tensor,
    ids_R: Tensor,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    topology: Topologies,
    activation: str,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out [R, D] in the source's type, z [R, P]); rows of blocks without an expert are 0, and not set in z.

    ``out[r] = weight[r] * act(source[ids[r]] @ w_up[e]) @ w_down[e]`` for the rows r of expert e. Matrices of
    another type are cast. Raises ValueError for shapes that do not fit the topology, and for fp64.
    """
    dtype = source_XD.dtype
    has_shape(ids_R, "the ids of rows", topology.up.rows.width)
    z_RP = sdd(gather_rows(source_XD, ids_R), w_up_EDP.to(dtype), topology.up, tf32=tf32)
    h_RF = weighted_activation(z_RP, weights_R, topology.experts_B, activation)
    return dsd(h_RF, topology.down, w_down_EFD.to(dtype), tf32=tf32), z_RP


def backward(
    dout_RD: Tensor,
    source_XD: Tensor,
    ids_R: Tensor,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    z_RP: Tensor | None,
    topology: Topologies,
    activation: str,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [R, D], dweights [R], dw_up, dw_down); experts without rows get zero gradients.

    Gradients of matrices have their types, and are rounded once. Where ``z_RP`` is None it is computed anew.
    Raises ValueError as :func:`forward` does.
    """
    dtype = source_XD.dtype
    up, down = topology.up, topology.down
    x_RD = gather_rows(source_XD, ids_R)
    if z_RP is None:
        z_RP = sdd(x_RD, w_up_EDP.to(dtype), up, tf32=tf32)
    dh_RF = sdd(dout_RD, w_down_EFD.to(dtype).mT, down, tf32=tf32)
    dz_RP, h_RF, dweights_R = weighted_activation_backward(
        dh_RF, z_RP, weights_R, topology.experts_B, activation
    )
    dw_down_EFD = dsd(h_RF, down, dout_RD, transposed=True, dtype=w_down_EFD.dtype, tf32=tf32)
    dx_RD = dsd(dz_RP, up, w_up_EDP.to(dtype).mT, tf32=tf32)
    return dx_RD, dweights_R, dds(x_RD.mT, dz_RP, up, dtype=w_up_EDP.dtype, tf32=tf32), dw_down_EFD


def gather_rows(source_XD: Tensor, ids_R: Tensor) -> Tensor:
    """``source[ids]``, zero where an id is -1."""
    if source_XD.shape[0] == 0:
        return source_XD.new_zeros(ids_R.shape[0], source_XD.shape[1])
    rows_RD = source_XD.index_select(0, ids_R.clamp(min=0))
    return rows_RD.masked_fill_((ids_R < 0)[:, None], 0)

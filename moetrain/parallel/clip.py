"""Gradient norm and clipping over parameters that live on different meshes, or on none.

Each rank adds up its own shards; the partial sums of one mesh travel in one small all-reduce per sharded
mesh dimension, and the meshes' totals are combined last. Replicated gradients are counted once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moetrain.ops.local_part import local_part
from moetrain.parallel.watchdog.flight_recorder import watched

_ROW = 1024  # elements of a vector that are squared and added in fp32
_Layout = tuple[DeviceMesh, tuple[int, ...]]  # a mesh, and the dimensions of it that shard the gradient


@torch.no_grad()
def global_norm(parameters: Iterable[nn.Parameter], norm_type: float = 2.0) -> Tensor:
    """The norm (2 or inf) of all gradients taken as one vector: an fp64 scalar, the same on every rank.

    A missing gradient counts as zero; nan counts as inf in the inf norm. Every rank must pass the same
    parameters in the same order. Nothing waits for the device. Raises ValueError for another ``norm_type``
    and for a gradient that is still a partial sum.
    """
    if norm_type not in (2.0, math.inf):
        raise ValueError(f"norm_type={norm_type} must be 2 or inf")
    # Grouped by the parameter, not the gradient: ranks that miss a gradient still join the collective.
    groups: dict[_Layout | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(_layout(parameter), []).append(parameter)
    totals = []
    for layout, members in groups.items():
        grads = [local_part(p.grad) for p in members if p.grad is not None]
        total = local_total(grads, norm_type, local_part(members[0]).device)
        if layout is not None:
            mesh, dims = layout
            for dim in dims:
                all_reduce_total_(total, norm_type, mesh.get_group(dim))
        totals.append(total)
    if not totals:
        return torch.zeros((), dtype=torch.float64)
    return combined(totals, norm_type)


@torch.no_grad()
def clip_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients by min(1, max_norm / norm) in place; returns the L2 norm from before.

    A norm that is not finite leaves the gradients as they are, for the caller to judge. Nothing waits for
    the device.
    """
    parameters = list(parameters)
    norm = global_norm(parameters)
    scale_([local_part(p.grad) for p in parameters if p.grad is not None], norm, max_norm)
    return norm


@torch.no_grad()
def scale_(grads: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Multiply plain tensors by min(1, max_norm / norm) in place; by 1 where ``norm`` is not finite."""
    grads = list(grads)
    scale = torch.where(norm.isfinite(), (max_norm / norm).clamp(max=1.0), 1.0)
    for device in dict.fromkeys(g.device for g in grads):
        torch._foreach_mul_([g for g in grads if g.device == device], scale.to(device))


def local_total(grads: Iterable[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Sum of squares (or largest magnitude) of plain tensors, fp64; norms are of fp32 or fp64."""
    grads = [g for g in grads if g.numel()]
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = [_norm(g, norm_type) for g in grads]
    norms_fp64 = torch.stack([n.to(device, torch.float64) for n in norms])
    if norm_type == 2.0:
        return norms_fp64.square().sum()
    return norms_fp64.nan_to_num(nan=math.inf, posinf=math.inf).amax()  # a collective's max may drop a nan


def _norm(gradient: Tensor, norm_type: float) -> Tensor:
    """Of one tensor. A CPU adds the squares of all elements one after the other in fp32, which is off by 1e-5
    for a million of them, and by something else for each shard; so there it does rows, and fp64 the rest.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    if gradient.device.type != "cpu" or wide != torch.float32:
        norm: Tensor = torch.linalg.vector_norm(gradient, norm_type, dtype=wide)
        return norm
    rows = [gradient]
    if gradient.dim() < 2:
        flat = gradient.flatten()
        whole = flat.numel() - flat.numel() % _ROW
        rows = [flat[:whole].unflatten(0, (-1, _ROW)), flat[whole:]]
    norms = [torch.linalg.vector_norm(r, norm_type, dim=-1, dtype=wide).flatten() for r in rows if r.numel()]
    total: Tensor = torch.linalg.vector_norm(torch.cat(norms), norm_type, dtype=torch.float64)
    return total


def all_reduce_total_(total: Tensor, norm_type: float, group: dist.ProcessGroup | None) -> None:
    """Combine the :func:`local_total` of the ranks of ``group``, None for all, in place."""
    op = dist.ReduceOp.SUM if norm_type == 2.0 else dist.ReduceOp.MAX
    with watched("the gradients' norm", group=group):
        dist.all_reduce(total, op=op, group=group)


def combined(totals: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm of all gradients, from the totals of disjoint sets of them; at least one set."""
    stacked = torch.stack([total.to(totals[0].device) for total in totals])
    return stacked.sum().sqrt() if norm_type == 2.0 else stacked.amax()


def _layout(parameter: nn.Parameter) -> _Layout | None:
    if not isinstance(parameter, DTensor):
        return None
    if any(placement.is_partial() for placement in parameter.placements):
        raise ValueError(f"a parameter placed as {parameter.placements} is a partial sum")
    # Not is_shard(): what FSDP2 makes of an already sharded dimension is a kind of its own.
    sharded = tuple(dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate())
    return parameter.device_mesh, sharded

"""The activation and routing weight between the products of the dropless layer, forward and backward.

Shapes: B blocks of R rows, each of one expert, F hidden, P = 2F (gate columns, then up columns) or F.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..activations import GATED, PLAIN, activate, activate_backward, is_gated
from ..specimen import Specimen
from ..tiles import Arch
from .parts import DTYPES, checked, has_shape, on_device, signature

_FORWARD, _BACKWARD = 128, 64  # columns at a time: of 128 a backward pass holds so much that it spills


@triton.jit
def forward_kernel(
    h, z, weights, experts, hidden, h_row, z_row,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """ROWS rows of h, COLUMNS at a time."""
    row = tl.program_id(0).to(tl.int64) * ROWS
    if tl.load(experts + row // BLOCK) < 0:
        return
    rows = row + tl.arange(0, ROWS)
    weight = tl.load(weights + rows).to(tl.float32)
    for start in range(0, hidden, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = tl.broadcast_to(columns[None, :] < hidden, ROWS, COLUMNS)
        gate, up = _gate_and_up(z + rows[:, None] * z_row + columns[None, :], hidden, inside, GATED)
        value = activate(gate, up, NAME) * weight[:, None]
        tl.store(h + rows[:, None] * h_row + columns[None, :], value.to(h.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dz, h, dweights, dh, z, weights, experts, hidden, dz_row, h_row, dh_row, z_row,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """ROWS rows of dz, of h with its weight and of the weight's gradient, which sums from left to right."""
    row = tl.program_id(0).to(tl.int64) * ROWS
    rows = row + tl.arange(0, ROWS)
    total = tl.full((ROWS,), 0.0, tl.float32)
    if tl.load(experts + row // BLOCK) < 0:
        tl.store(dweights + rows, total.to(dweights.dtype.element_ty))
        return
    weight = tl.load(weights + rows).to(tl.float32)
    for start in range(0, hidden, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = tl.broadcast_to(columns[None, :] < hidden, ROWS, COLUMNS)
        gate, up = _gate_and_up(z + rows[:, None] * z_row + columns[None, :], hidden, inside, GATED)
        upstream = tl.load(dh + rows[:, None] * dh_row + columns[None, :], mask=inside, other=0.0)
        upstream = upstream.to(tl.float32)
        value = activate(gate, up, NAME)
        total += tl.sum(tl.where(inside, upstream * value, 0.0), 1)
        value *= weight[:, None]
        tl.store(h + rows[:, None] * h_row + columns[None, :], value.to(h.dtype.element_ty), mask=inside)
        dgate, dup = activate_backward(upstream * weight[:, None], gate, up, NAME)
        here = dz + rows[:, None] * dz_row + columns[None, :]
        if GATED:
            tl.store(here, dgate.to(dz.dtype.element_ty), mask=inside)
            here += hidden
        tl.store(here, dup.to(dz.dtype.element_ty), mask=inside)
    tl.store(dweights + rows, total.to(dweights.dtype.element_ty))


@triton.jit
def _gate_and_up(z, hidden, inside, GATED: tl.constexpr):
    """The two pre-activations in fp32; the gate is the up projection where the activation has none."""
    first = tl.load(z, mask=inside, other=0.0).to(tl.float32)
    second = first
    if GATED:
        second = tl.load(z + hidden, mask=inside, other=0.0).to(tl.float32)
    return first, second


def weighted_activation(z_RP: Tensor, weights_R: Tensor, experts_B: Tensor, activation: str) -> Tensor:
    """h [R, F] = weight * activation(z); rows of blocks whose expert is -1 are not written.

    Raises ValueError for an unknown activation, for shapes that do not fit, and for a type without kernels.
    """
    arch = _checked(z_RP, weights_R, experts_B, activation)
    h_RF = z_RP.new_empty(_hidden(z_RP, activation))
    if z_RP.shape[0]:
        tile = constants(arch, z_RP.shape[0] // experts_B.shape[0], activation, _FORWARD)
        with on_device(z_RP):
            forward_kernel[(z_RP.shape[0] // tile["ROWS"],)](
                h_RF, z_RP, weights_R, experts_B, h_RF.shape[1], h_RF.stride(0), z_RP.stride(0),
                **tile, NAME=activation,
            )  # fmt: skip
    return h_RF


def weighted_activation_backward(
    dh_RF: Tensor, z_RP: Tensor, weights_R: Tensor, experts_B: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz [R, P], h [R, F] with its weight, dweights [R]) of the gradient of h.

    Rows of blocks whose expert is -1 have dweights 0, and their dz and h are not written. Raises ValueError
    as :func:`weighted_activation` does.
    """
    arch = _checked(z_RP, weights_R, experts_B, activation)
    has_shape(dh_RF, "the gradient of h", *_hidden(z_RP, activation))
    dz_RP, h_RF = z_RP.new_empty(z_RP.shape), dh_RF.new_empty(dh_RF.shape)
    dweights_R = weights_R.new_empty(weights_R.shape)
    if z_RP.shape[0]:
        tile = constants(arch, z_RP.shape[0] // experts_B.shape[0], activation, _BACKWARD)
        with on_device(z_RP):
            backward_kernel[(z_RP.shape[0] // tile["ROWS"],)](
                dz_RP, h_RF, dweights_R, dh_RF, z_RP, weights_R, experts_B, h_RF.shape[1],
                dz_RP.stride(0), h_RF.stride(0), dh_RF.stride(0), z_RP.stride(0), **tile, NAME=activation,
            )  # fmt: skip
    return dz_RP, h_RF, dweights_R


def constants(arch: Arch, block: int, activation: str, columns: int) -> dict[str, int]:
    """A kernel's tile, whose rows divide a block of rows."""
    rows, columns = (block, 64) if arch.interpreted else (16, columns)
    return {"BLOCK": block, "ROWS": rows, "COLUMNS": columns, "GATED": is_gated(activation)}


def specimens(arch: Arch) -> list[Specimen]:
    """Both kernels with every activation in bf16, and with the first in the other types."""
    found = []
    for dtype in DTYPES:
        for name in (GATED + PLAIN)[: None if dtype is DTYPES[0] else 1]:
            for kernel, columns in ((forward_kernel, _FORWARD), (backward_kernel, _BACKWARD)):
                fixed: dict[str, object] = {**constants(arch, 128, name, columns), "NAME": name}
                types = signature(kernel, fixed, dtype)
                found.append(Specimen(f"{kernel.__name__} {name} {dtype}", kernel, types, fixed, 4, 1, False))
    return found


def _hidden(z_RP: Tensor, activation: str) -> tuple[int, int]:
    return z_RP.shape[0], z_RP.shape[1] // (1 + is_gated(activation))


def _checked(z_RP: Tensor, weights_R: Tensor, experts_B: Tensor, activation: str) -> Arch:
    rows, hidden = _hidden(z_RP, activation)
    has_shape(z_RP, "the pre-activation", rows, hidden * (1 + is_gated(activation)))
    has_shape(weights_R, "the routing weights", rows)
    if z_RP.stride(1) != 1 or not weights_R.is_contiguous():
        raise ValueError("the pre-activation's rows and the routing weights must be contiguous")
    return checked(z_RP)

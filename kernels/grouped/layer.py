"""The experts' feed-forward on named rows by grouped products, forward and backward.

Shapes: X source rows, D model, E experts, F hidden, P = 2F (gate, then up) or F, R block-aligned rows.

``out[r] = (weight[r] * act(source[ids[r]] @ w_up[e])) @ w_down[e]``. Only the pre-activation is kept for the
backward pass, or not even that. Sums have one order, whatever the launch: two runs are equal bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import is_gated
from ..metadata import Blocks
from .hidden_gradient import hidden_gradient
from .product import product
from .up import up
from .weight_gradient import weight_gradient


def forward(
    source_XD: Tensor,
    meta: Blocks,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    activation: str,
    keep: bool = True,
    tf32: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(out [R, D], z [R, P] or, not ``keep``, None) in the source's type.

    Matrices of another type are cast as they are read. Rows behind the last used block are not written.
    ``tf32`` lets fp32 products round their operands to 10 bits.

    Raises:
        ValueError: A type or a shape that the kernels do not take.
    """
    hidden = _check(source_XD, meta, weights_R, w_up_EDP, w_down_EFD, activation)
    source_XD, rows = _contiguous_rows(source_XD), meta.ids_R.shape[0]
    z_RP = source_XD.new_empty(rows, w_up_EDP.shape[2]) if keep else None
    h_RF = source_XD.new_empty(rows, hidden)
    up(source_XD, meta, weights_R, w_up_EDP, activation, z_RP, h_RF, tf32)
    out_RD = source_XD.new_empty(rows, w_down_EFD.shape[2])
    product(h_RF, meta, w_down_EFD, out_RD, tf32)
    return out_RD, z_RP


def backward(
    dout: Tensor,
    source_XD: Tensor,
    meta: Blocks,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    z_RP: Tensor | None,
    activation: str,
    gathered: bool = False,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [R, D], dweights [R], dw_up, dw_down); experts without rows get zero gradients.

    ``dout`` is [R, D], or, ``gathered``, the gradient [X, D] of each source row's sum. Where ``z_RP`` is None
    it is computed anew. dx is not written behind the last used block; dweights is 0 there and on padding.

    Raises:
        ValueError: A type or a shape that the kernels do not take.
    """
    hidden = _check(source_XD, meta, weights_R, w_up_EDP, w_down_EFD, activation)
    rows = source_XD.shape[0] if gathered else meta.ids_R.shape[0]
    if dout.shape != (rows, w_down_EFD.shape[2]) or dout.dtype is not source_XD.dtype:
        raise ValueError(f"dout is {_of(dout)}, not [{rows}, {w_down_EFD.shape[2]}] in {source_XD.dtype}")
    source_XD, dout = _contiguous_rows(source_XD), _contiguous_rows(dout)
    shape = (meta.ids_R.shape[0], w_up_EDP.shape[2])
    if z_RP is None:
        z_RP = source_XD.new_empty(shape)
        up(source_XD, meta, weights_R, w_up_EDP, activation, z_RP, None, tf32)
    dz_RP, h_RF = source_XD.new_empty(shape), source_XD.new_empty(shape[0], hidden)
    dweights_R = hidden_gradient(
        dout, meta, weights_R, w_down_EFD, z_RP, activation, dz_RP, h_RF, gathered, tf32
    )
    dw_down_EFD = torch.empty_like(w_down_EFD, memory_format=torch.contiguous_format)
    weight_gradient(h_RF, dout, meta, dw_down_EFD, (False, gathered), tf32)
    dw_up_EDP = torch.empty_like(w_up_EDP, memory_format=torch.contiguous_format)
    weight_gradient(source_XD, dz_RP, meta, dw_up_EDP, (True, False), tf32)
    dx_RD = source_XD.new_empty(shape[0], source_XD.shape[1])
    product(dz_RP, meta, w_up_EDP.transpose(1, 2), dx_RD, tf32)
    return dx_RD, dweights_R, dw_up_EDP, dw_down_EFD


def _check(
    source_XD: Tensor,
    meta: Blocks,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    activation: str,
) -> int:
    """The width F of the hidden rows."""
    experts, hidden = w_down_EFD.shape[:2]
    columns = hidden * (2 if is_gated(activation) else 1)
    of_rows = meta.block_starts_E1.shape[0] - 1
    if w_up_EDP.shape != (experts, source_XD.shape[1], columns) or experts != of_rows:
        raise ValueError(
            f"source {_of(source_XD)}, w_up {_of(w_up_EDP)}, w_down {_of(w_down_EFD)}, {activation} and "
            f"rows of {of_rows} experts do not fit each other"
        )
    if weights_R.shape != meta.ids_R.shape:
        raise ValueError(f"weights {_of(weights_R)} are not one for each of {meta.ids_R.shape[0]} rows")
    for name, tensor in (("weights", weights_R), ("w_up", w_up_EDP), ("w_down", w_down_EFD)):
        if tensor.dtype is torch.float64:
            raise ValueError(f"{name} are float64; kernels take bf16, fp16 and fp32")
    return hidden


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _of(x: Tensor) -> str:
    return f"{list(x.shape)} in {str(x.dtype).removeprefix('torch.')}"

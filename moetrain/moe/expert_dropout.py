"""Dropout inside experts: of what an expert reads, and of its hidden units, in training.

Masks are a pure function of (seed, step, layer, sample, position, expert, column), like all noise here, so
that recomputation, micro-batches and layouts draw the same. Where a row is computed, its token is no longer
known: each token's row therefore carries a key of 32 bits, as bytes in four more columns, which every dtype
of activations holds exactly. Experts cut them off again.

Products beside the matrices read rows of which other elements are dropped.

Sources: Fedus et al. 2021, arXiv:2101.03961 ("expert dropout"); Wu et al. 2024, arXiv:2401.02731 (adapters).

Shapes: T tokens, X source rows, D model, R computed rows, E experts here, F hidden, n columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.moe.context import RouterContext
from moetrain.moe.dispatch.base import ExpertRows
from moetrain.ops.activations import activate, gate_and_up
from moetrain.ops.counter import mix
from moetrain.ops.experts.loop import with_bias, with_product
from moetrain.ops.experts.operands import Pair
from moetrain.ops.gather_sum import gather_rows
from moetrain.ops.grouped_mm import grouped_mm

_SALT, _INPUT_SALT, _HIDDEN_SALT = 0xD209, 1, 2
UP_SALT, DOWN_SALT, GATE_SALT = 3, 4, 5  # of what products beside the matrices read
_BYTES = 4


@dataclass(frozen=True)
class ExpertDropout:
    """The probabilities with which an element is dropped; what is kept is divided by 1 - p."""

    inputs: float = 0.0
    hidden: float = 0.0
    beside: float = 0.0  # of what low-rank products beside the matrices read

    def __bool__(self) -> bool:
        return bool(self.inputs or self.hidden or self.beside)


def with_keys(x_TD: Tensor, ctx: RouterContext) -> Tensor:
    """[T, D + 4]: each token's row, and its key."""
    key_TB = (ctx.uniform((x_TD.shape[0], _BYTES), _SALT) * 256).floor()
    return torch.cat([x_TD, key_TB.to(x_TD.dtype)], 1)


def expert_mlp_dropped(
    rows: ExpertRows,
    experts_E: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    activation: str,
    dropout: ExpertDropout,
    dtype: torch.dtype,
    backend: str,
    biases: tuple[Tensor, Tensor] | None = None,
    up: Pair | None = None,
    down: Pair | None = None,
) -> Tensor:
    """What ``moetrain.ops.expert_mlp`` computes, out [R, D], with ``dropout``; autograd keeps what it needs.

    ``rows.source_XD`` is :func:`with_keys`'s. ``experts_E``: each expert's number in the layer, int64.
    ``backend``: of the grouped products. ``biases``: of both, [E, P] and [E, D], which are never dropped.
    """
    segments, ids_R = rows.rows.segments, rows.rows.ids_R
    source_XD, row_R = without_keys(rows, experts_E)
    x_RD = dropped(gather_rows(source_XD.to(dtype), ids_R), row_R, _INPUT_SALT, dropout.inputs)
    bias_up_EP, bias_down_ED = biases or (None, None)
    z_RP = with_bias(grouped_mm(x_RD, w_up_EDP.to(dtype), segments.aligned, backend), bias_up_EP, segments)
    if up is not None:
        x_RD = dropped(x_RD, row_R, UP_SALT, dropout.beside)
        z_RP = with_product(z_RP, x_RD, up, segments.aligned, backend)
    h_RF = activate(*gate_and_up(z_RP, activation), activation)
    h_RF = dropped(h_RF, row_R, _HIDDEN_SALT, dropout.hidden)
    out_RD = grouped_mm(h_RF, w_down_EFD.to(dtype), segments.aligned, backend)
    out_RD = with_bias(out_RD, bias_down_ED, segments)
    if down is not None:
        h_RF = dropped(h_RF, row_R, DOWN_SALT, dropout.beside)
        out_RD = with_product(out_RD, h_RF, down, segments.aligned, backend)
    return (out_RD * rows.weights_R[:, None]).to(dtype)


def without_keys(rows: ExpertRows, experts_E: Tensor) -> tuple[Tensor, Tensor]:
    """(:func:`with_keys`'s input [X, D], int64 [R]: a key of each (token, expert)); padding has any."""
    segments, ids_R = rows.rows.segments, rows.rows.ids_R
    source_XD, bytes_XB = rows.source_XD.split([rows.source_XD.shape[1] - _BYTES, _BYTES], 1)
    expert_R = experts_E.repeat_interleave(segments.aligned_E, output_size=len(ids_R))
    return source_XD, _row_keys(bytes_XB.detach(), ids_R, expert_R)


def _row_keys(bytes_XB: Tensor, ids_R: Tensor, expert_R: Tensor) -> Tensor:
    place_B = 256 ** torch.arange(_BYTES, device=ids_R.device)
    key_X = (bytes_XB.to(torch.int64) * place_B).sum(1)
    key_R = gather_rows(key_X[:, None], ids_R).squeeze(1)
    return mix(mix(key_R) + expert_R)


def dropped(values_Rn: Tensor, row_R: Tensor, salt: int, rate: float) -> Tensor:
    """``values`` with a share ``rate`` of them dropped, by keys of rows, as they are where it is 0."""
    if not rate:
        return values_Rn
    columns_n = torch.arange(values_Rn.shape[1], device=row_R.device)
    bits_Rn = (mix(mix(row_R + salt)[:, None] + columns_n) >> 41) & 0x7FFFFF
    kept_Rn = bits_Rn >= round(rate * 2**23)
    return values_Rn * kept_Rn.to(values_Rn.dtype) / (1 - rate)

"""Expert MLP, one expert at a time: gather, product, activation and product stay in cache.

Shapes as in ``ops/experts/operator.py``; n rows of one expert. Rows are rounded up, because oneDNN compiles a
matmul kernel for every new row count and keeps it, with about 0.3 MB, for as long as the process lives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops.activations import activate, activate_again, activate_backward, gate_and_up
from moetrain.ops.cpu.product import outer, product
from moetrain.ops.cpu.threads import for_each
from moetrain.ops.experts.case import TILE, Case
from moetrain.ops.experts.operands import Operands
from moetrain.ops.experts.pairs import add_backward, add_product
from moetrain.ops.experts.rows import Segments

ON_DEVICE, WIDTH_UNIT = False, TILE
_HANDFUL = 32
_FP32_STEPS = 16  # row counts that are told apart between a power of two and the next


class _Segment(NamedTuple):
    """The rows of one expert that has some: ``rows`` useful ones from ``start`` on, ``width`` to compute."""

    expert: int
    start: int
    rows: int
    width: int
    end: int  # of all that are the expert's, padding included


def refusal(case: Case) -> str | None:
    """None: one product an expert, of any widths and dtype, on any device."""
    return None


def _segments(segments: Segments, dtype: torch.dtype) -> Iterator[_Segment]:
    """Of each non-empty expert."""
    start = 0
    for expert, (rows, width) in enumerate(zip(segments.on_host, segments.aligned, strict=True)):
        if rows:
            yield _Segment(expert, start, rows, min(_computed(rows, width, dtype), width), start + width)
        start += width


def _computed(rows: int, width: int, dtype: torch.dtype) -> int:
    """Rows to compute: all aligned ones in bf16; at most 1/16 of padding, or 7 rows, in fp32; no padding in
    fp64, which needs no kernel, or for a handful.
    """
    if dtype is torch.float64 or rows < _HANDFUL:
        return rows
    if dtype is not torch.float32:
        return width
    multiple = max(8, (1 << (rows - 1).bit_length()) // (2 * _FP32_STEPS))
    return -(-rows // multiple) * multiple


def kept_rows(segments: Segments, rows: int, dtype: torch.dtype) -> list[int]:
    """The rows of each pre-activation that :func:`forward` returns: one per non-empty expert."""
    return [segment.width for segment in _segments(segments, dtype)]


def _work(operands: Operands, segments: Sequence[_Segment]) -> list[int]:
    """Multiplications of each segment's up projection; none where the device has threads of its own."""
    each = operands.source_XD.shape[1] * operands.columns if operands.source_XD.device.type == "cpu" else 0
    return [segment.width * each for segment in segments]


def _gather(source_XD: Tensor, ids_R: Tensor, start: int, rows: int, width: int) -> Tensor:
    ids_n = ids_R[start : start + rows]
    if rows == width:
        return source_XD.index_select(0, ids_n)
    x_nD = source_XD.new_empty(width, source_XD.shape[1])
    torch.index_select(source_XD, 0, ids_n, out=x_nD[:rows])
    x_nD[rows:].zero_()
    return x_nD


def _pre_activation(operands: Operands, expert: int, start: int, rows: int, width: int) -> Tensor:
    x_nD = _gather(operands.source_XD, operands.ids_R, start, rows, width)
    z_nP = product(x_nD, operands.w_up_EDP[expert].to(operands.dtype))
    if operands.bias_up_EP is not None:
        z_nP += operands.bias_up_EP[expert].to(operands.dtype)
    add_product(z_nP, x_nD, operands.up, expert)
    return z_nP


def _weighted(h_nF: Tensor, weights_n: Tensor) -> Tensor:
    return h_nF.mul_(weights_n.to(h_nF.dtype)[:, None])


def forward(operands: Operands, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """(out [R, D], the pre-activations [n, P] of the non-empty experts, each where its product wrote it; none
    of them if not ``keep``).
    """
    out_RD = operands.empty_out()
    w_downs = operands.w_down_EFD.unbind()
    segments = list(_segments(operands.segments, operands.dtype))

    def one(number: int) -> Tensor | None:
        z_nP = _forward_one(operands, segments[number], w_downs, out_RD)
        return z_nP if keep else None

    kept = for_each(one, _work(operands, segments))
    return out_RD, [z_nP for z_nP in kept if z_nP is not None]


def _forward_one(operands: Operands, segment: _Segment, w_downs: Sequence[Tensor], out_RD: Tensor) -> Tensor:
    """Write one expert's rows of ``out_RD``; its pre-activation."""
    dtype, activation = operands.dtype, operands.activation
    e, start, rows, width, end = segment
    stop = start + width
    z_nP = _pre_activation(operands, e, start, rows, width)
    h_nF = activate(*gate_and_up(z_nP, activation), activation)
    h_nF = _weighted(h_nF, operands.weights_R[start:stop])
    product(h_nF, w_downs[e].to(dtype), out=out_RD[start:stop])
    if operands.bias_down_ED is not None:
        weights_n1 = operands.weights_R[start:stop, None].to(dtype)
        out_RD[start:stop].addcmul_(weights_n1, operands.bias_down_ED[e].to(dtype))
    add_product(out_RD[start:stop], h_nF, operands.down, e)
    if stop < end:
        out_RD[stop:end].zero_()
    return z_nP


@dataclass(frozen=True)
class _Gradients:
    """What a backward pass fills; of matrices that are not trained, empty tensors."""

    dx_RD: Tensor
    dweights_R: Tensor
    dw_up_EDP: Tensor
    dw_down_EFD: Tensor
    dbiases: list[Tensor]

    @classmethod
    def of(cls, operands: Operands) -> _Gradients:
        """Zeros for experts without rows; of all others unset."""
        source_XD, trained = operands.source_XD, operands.trained
        dmatrices = [
            torch.empty_like(w) if trained else w.new_empty(0)
            for w in (operands.w_up_EDP, operands.w_down_EFD)
        ]
        for e, rows in enumerate(operands.segments.on_host if trained else ()):
            if not rows:
                for dmatrix in dmatrices:
                    dmatrix[e].zero_()
        dbiases = [torch.zeros_like(b) for b in operands.biases] if trained else []
        dx_RD = source_XD.new_empty(operands.num_rows, source_XD.shape[1])
        return cls(dx_RD, torch.zeros_like(operands.weights_R), dmatrices[0], dmatrices[1], dbiases)


def backward(dout_RD: Tensor, operands: Operands, kept: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """(dx [R, D], dweights [R], dw_up, dw_down, and the biases'); experts without rows get zero gradients."""
    found = _Gradients.of(operands)
    matrices = operands.w_up_EDP.unbind(), operands.w_down_EFD.unbind()
    segments = list(_segments(operands.segments, operands.dtype))

    def one(number: int) -> None:
        z_nP = None if kept is None else kept[number]
        _backward_one(operands, segments[number], matrices, dout_RD, z_nP, found)

    for_each(one, _work(operands, segments))
    return found.dx_RD, found.dweights_R, found.dw_up_EDP, found.dw_down_EFD, *found.dbiases


def _backward_one(
    operands: Operands,
    segment: _Segment,
    matrices: tuple[Sequence[Tensor], Sequence[Tensor]],
    dout_RD: Tensor,
    z_nP: Tensor | None,
    found: _Gradients,
) -> None:
    """Write one expert's gradients and its rows' to ``found``; without ``z_nP``, that is computed again."""
    dtype, activation, trained = operands.dtype, operands.activation, operands.trained
    e, start, rows, width, _ = segment
    stop, (w_ups, w_downs) = start + width, matrices
    z_nP = _pre_activation(operands, e, start, rows, width) if z_nP is None else z_nP
    dout_nD, weights_n = dout_RD[start:stop], operands.weights_R[start:stop]
    gate_nF, up_nF = gate_and_up(z_nP, activation)
    h_nF, active_nF = activate_again(gate_nF, up_nF, activation)
    dh_nF = product(dout_nD, w_downs[e].to(dtype).t())
    if operands.down is not None:
        add_backward(dh_nF, _weighted(h_nF.clone(), weights_n), dout_nD, operands.down, e)
    # sum of products without a rounded product: the weight's gradient stays at least fp32
    found.dweights_R[start:stop] = torch.linalg.vecdot(dh_nF.to(weights_n.dtype), h_nF.to(weights_n.dtype))
    scaled_nD = dout_nD * weights_n.to(dtype)[:, None] if trained else dout_nD
    if trained:
        outer(h_nF, scaled_nD, found.dw_down_EFD[e])
    dz_nP = torch.empty_like(z_nP)
    dh_nF = _weighted(dh_nF, weights_n)
    activate_backward(dh_nF, gate_nF, up_nF, active_nF, activation, *gate_and_up(dz_nP, activation))
    x_nD = operands.source_XD[:0]
    if trained or operands.up:
        x_nD = _gather(operands.source_XD, operands.ids_R, start, rows, width)
    if trained:
        outer(x_nD, dz_nP, found.dw_up_EDP[e])
    product(dz_nP, w_ups[e].to(dtype).t(), out=found.dx_RD[start:stop])
    add_backward(found.dx_RD[start:stop], x_nD, dz_nP, operands.up, e)
    if operands.bias_down_ED is not None:
        bias_D = operands.bias_down_ED[e].to(weights_n.dtype)
        found.dweights_R[start:stop] += dout_nD.to(weights_n.dtype) @ bias_D
    for dbias_EA, dy_nA in zip(found.dbiases, (dz_nP, scaled_nD), strict=False):
        dbias_EA[e] = dy_nA.sum(0, dtype=torch.promote_types(dtype, torch.float32))

"""The self-test of an experts' backend on this device, once a process, against the loop in fp64.

Shapes: X source rows, D model, R rows, E experts, F hidden, P = 2F (gated) or F.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moetrain.ops import self_test
from moetrain.ops.experts import loop
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.rows import Rows, Segments

# of the largest value; rows missing, twice, or of another expert change values by far more
_COARSEST = 4 * 2**-10  # an accelerator may take products of fp32 in ten bits
_NAMES = (
    "output",
    "gradient of the rows",
    "gradient of the routing weights",
    "w_up gradient",
    "w_down gradient",
)


class Computes(Protocol):
    """The part of a backend that is tested."""

    def forward(
        self, source_XD: Tensor, ids_R: Tensor, weights_R: Tensor, w_up_EDP: Tensor, w_down_EFD: Tensor,
        segments: Segments, activation: str,
    ) -> tuple[Tensor, list[Tensor]]: ...  # fmt: skip

    def backward(
        self, dout_RD: Tensor, source_XD: Tensor, ids_R: Tensor, weights_R: Tensor, w_up_EDP: Tensor,
        w_down_EFD: Tensor, kept: Sequence[Tensor], segments: Segments, activation: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...  # fmt: skip


def failure(backend: Computes, case: Case) -> str | None:
    """What is wrong with a backend's output or gradients, as a phrase; None if they are right up to rounding.

    None too on a device that this process only pretends to have.
    """
    return self_test.run(lambda: _failure(backend, case), case.device)


def _failure(backend: Computes, case: Case) -> str | None:
    with torch.no_grad():
        rows, operands, dout_RD = _inputs(case)
        found = _by(backend, rows, operands, dout_RD, case)
    right = _by_the_loop(rows, operands, dout_RD, case.activation)
    least = 0.0 if case.device.type == "cpu" else _COARSEST
    for name, ours, theirs in zip(_NAMES, found, right, strict=True):
        if line := self_test.off(name, ours, theirs, case.dtype, least):
            return line
    return None


def _inputs(case: Case) -> tuple[Rows, list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.device, case.dtype)

    counts = [case.block + 5, 0, 1, 2 * case.block + 6, 0]  # no row, one, more than one block, more than two
    num_source = max(counts) + 1
    aligned = [-(-count // case.block) * case.block for count in counts]
    ids_R = torch.full((sum(aligned),), -1)
    for start, count in zip(torch.tensor([0, *aligned]).cumsum(0).tolist(), counts, strict=False):
        ids_R[start : start + count] = torch.randperm(num_source, generator=generator)[:count].sort().values
    used_R = ids_R >= 0
    by_source_N = torch.where(used_R)[0][ids_R[used_R].argsort(stable=True)]
    ends_X = torch.bincount(ids_R[used_R], minlength=num_source).cumsum(0)
    device = case.device
    segments = Segments(torch.tensor(counts).to(device), case.block, counts)
    rows = Rows(ids_R.to(device), segments, by_source_N.to(device), ends_X.to(device))
    weights_R = torch.rand(len(ids_R), generator=generator) * used_R
    weights_R = weights_R.to(device, torch.promote_types(case.dtype, torch.float32))
    up = draw(len(counts), case.d_model, case.columns) / case.d_model**0.5
    down = draw(len(counts), case.d_ff, case.d_model) / case.d_ff**0.5
    dout_RD = draw(len(ids_R), case.d_model) * used_R[:, None].to(device)
    return rows, [draw(num_source, case.d_model), weights_R, up, down], dout_RD


def _by(backend: Computes, rows: Rows, operands: list[Tensor], dout_RD: Tensor, case: Case) -> list[Tensor]:
    source_XD, weights_R, up, down = operands
    named = (source_XD, rows.ids_R, weights_R, up, down)
    static = (rows.segments, case.activation)
    out_RD, kept = backend.forward(*named, *static)
    dx_RD, *others = backend.backward(dout_RD, *named, kept, *static)
    return [out_RD, _at_the_source(dx_RD, rows), *others]


def _at_the_source(dx_RD: Tensor, rows: Rows) -> Tensor:
    ids_R = rows.ids_R.cpu()
    used_R = ids_R >= 0
    return dx_RD.new_zeros(len(rows.ends_X), dx_RD.shape[1], device="cpu", dtype=torch.float64).index_add_(
        0, ids_R[used_R], dx_RD.cpu().double()[used_R]
    )


def _by_the_loop(rows: Rows, operands: list[Tensor], dout_RD: Tensor, activation: str) -> list[Tensor]:
    on_host = Rows(rows.ids_R.cpu(), rows.segments, rows.by_source_N.cpu(), rows.ends_X.cpu())
    source, weights, up, down = (t.cpu().double().requires_grad_() for t in operands)
    out_RD = loop.compute(source, on_host, weights, up, down, activation)
    grads = torch.autograd.grad(out_RD, [source, weights, up, down], dout_RD.cpu().double())
    return [out_RD.detach(), *grads]

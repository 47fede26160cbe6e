"""The self-test of an experts' backend on this device, once a process, against the loop in fp64.

Shapes: X source rows, D model, R rows, E experts, F hidden, P = 2F (gated) or F, L rank of a product
beside a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from moetrain.ops import self_test
from moetrain.ops.experts import loop
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.operands import Operands, Pair
from moetrain.ops.experts.rows import Segments

# of the largest value; rows missing, twice, or of another expert change values by far more
_COARSEST = 4 * 2**-10  # an accelerator may take products of fp32 in ten bits
_NAMES = (
    "output",
    "gradient of the rows",
    "gradient of the routing weights",
    "w_up gradient",
    "w_down gradient",
)
_BIASES = ("gradient of the up biases", "gradient of the down biases")
_FACTORS = tuple(f"gradient of the {of} product's {which}" for of in ("up", "down") for which in "ab")
_RANK = 8  # whole 16 bytes in every dtype, as grouped products want


class Computes(Protocol):
    """The part of a backend that is tested."""

    def forward(self, operands: Operands, keep: bool) -> tuple[Tensor, list[Tensor]]: ...

    def backward(
        self, dout_RD: Tensor, operands: Operands, kept: Sequence[Tensor] | None
    ) -> tuple[Tensor, ...]: ...


def failure(backend: Computes, case: Case) -> str | None:
    """What is wrong with a backend's output or gradients, as a phrase; None if they are right up to rounding.

    None too on a device that this process only pretends to have.
    """
    return self_test.run(lambda: _failure(backend, case), case.device)


def _failure(backend: Computes, case: Case) -> str | None:
    with torch.no_grad():
        operands, dout_RD = _inputs(case)
        found = _by(backend, operands, dout_RD, case.keep)
    right = _by_the_loop(operands, dout_RD)
    least = 0.0 if case.device.type == "cpu" else _COARSEST
    names = (*_NAMES, *(_BIASES if case.bias else ()), *(_FACTORS if case.added else ()))
    for name, ours, theirs in zip(names, found, right, strict=True):
        if line := self_test.off(name, ours, theirs, case.dtype, least):
            return line
    return None


def _inputs(case: Case) -> tuple[Operands, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.device, case.dtype)

    def pair(inner: int, outer: int) -> Pair | None:
        if not case.added:
            return None
        a_EKL, b_ELN = draw(len(counts), inner, _RANK) / inner**0.5, draw(len(counts), _RANK, outer)
        return Pair(a_EKL, b_ELN / _RANK**0.5, torch.zeros_like(a_EKL), torch.zeros_like(b_ELN))

    counts = [case.block + 5, 0, 1, 2 * case.block + 6, 0]  # no row, one, more than one block, more than two
    num_source = max(counts) + 1
    aligned = [-(-count // case.block) * case.block for count in counts]
    ids_R = torch.full((sum(aligned),), -1)
    for start, count in zip(torch.tensor([0, *aligned]).cumsum(0).tolist(), counts, strict=False):
        ids_R[start : start + count] = torch.randperm(num_source, generator=generator)[:count].sort().values
    used_R = ids_R >= 0
    weights_R = torch.rand(len(ids_R), generator=generator) * used_R
    operands = Operands(
        source_XD=draw(num_source, case.d_model),
        ids_R=ids_R.to(case.device),
        weights_R=weights_R.to(case.device, torch.promote_types(case.dtype, torch.float32)),
        w_up_EDP=draw(len(counts), case.d_model, case.columns) / case.d_model**0.5,
        w_down_EFD=draw(len(counts), case.d_ff, case.d_model) / case.d_ff**0.5,
        segments=Segments(torch.tensor(counts).to(case.device), case.block, counts),
        activation=case.activation,
        bias_up_EP=draw(len(counts), case.columns) if case.bias else None,
        bias_down_ED=draw(len(counts), case.d_model) if case.bias else None,
        up=pair(case.d_model, case.columns),
        down=pair(case.d_ff, case.d_model),
    )
    return operands, draw(len(ids_R), case.d_model) * used_R[:, None].to(case.device)


def _by(backend: Computes, operands: Operands, dout_RD: Tensor, keep: bool) -> list[Tensor]:
    out_RD, kept = backend.forward(operands, keep)
    dx_RD, *others = backend.backward(dout_RD, operands, kept if keep else None)
    factors = [gradient for pair in (operands.up, operands.down) if pair for gradient in pair.gradients]
    return [out_RD, _at_the_source(dx_RD, operands), *others, *factors]


def _at_the_source(dx_RD: Tensor, operands: Operands) -> Tensor:
    ids_R = operands.ids_R.cpu()
    used_R = ids_R >= 0
    dsource_XD = torch.zeros(operands.source_XD.shape, dtype=torch.float64)
    return dsource_XD.index_add_(0, ids_R[used_R], dx_RD.cpu().double()[used_R])


def _by_the_loop(operands: Operands, dout_RD: Tensor) -> list[Tensor]:
    tensors = operands.source_XD, operands.weights_R, operands.w_up_EDP, operands.w_down_EFD
    pairs = [pair for pair in (operands.up, operands.down) if pair]
    factors = [factor for pair in pairs for factor in (pair.a_EKL, pair.b_ELN)]
    leaves = [t.cpu().double().requires_grad_() for t in (*tensors, *operands.biases, *factors)]
    source, weights, w_up, w_down, *others = leaves
    bias_up, bias_down = others[:2] if operands.biases else (None, None)
    up, down = (Pair(*others[-4:-2]), Pair(*others[-2:])) if pairs else (None, None)
    ids_R, activation = operands.ids_R.cpu(), operands.activation
    segments = replace(operands.segments, counts_E=operands.segments.counts_E.cpu())
    out_RD = loop.compute(
        Operands(source, ids_R, weights, w_up, w_down, segments, activation, bias_up, bias_down, up, down)
    )
    grads = torch.autograd.grad(out_RD, leaves, dout_RD.cpu().double())
    return [out_RD.detach(), *grads]

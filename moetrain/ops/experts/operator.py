"""The experts' feed-forward on named rows: gather, up projection, activation, weight, down projection.

Shapes: X source rows, D model, R rows in block-aligned expert order (padding has id -1 and weight 0),
E experts, F hidden, P = 2F (gated) or F, N assignments.

``out[r] = weight[r] * act(source[ids[r]] @ w_up[e]) @ w_down[e]``. The weight is applied to the hidden rows,
so its gradient is an inner product there and the down projection's output need not be kept (the same
identity as SonicMoE's, Guo et al. 2025). Kept for backward: the source, the ids, the weights, and, with
``keep``, the pre-activation (z [R, P], or one tensor an expert). All else is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moetrain.ops.experts import loop
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.operands import Operands
from moetrain.ops.experts.rows import Rows, Segments
from moetrain.ops.experts.table import BACKENDS, LOOP, Backend, choose
from moetrain.ops.kernel_or_torch import AUTO

# The operator's arguments: operands, then what the rows are, then what is no tensor.
_NAMED, _TENSORS = 5, 8
_ARGUMENTS = (
    "Tensor source, Tensor ids, Tensor weights, Tensor w_up, Tensor w_down, "
    "Tensor by_source, Tensor ends, Tensor counts, "
    "SymInt[]? useful, SymInt block, str activation, bool keep, str backend"
)


def expert_mlp(
    source_XD: Tensor,
    rows: Rows,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    activation: str,
    backend: str = AUTO,
    dtype: torch.dtype | None = None,
    keep: bool = True,
) -> Tensor:
    """out [R, D] in ``dtype`` (default: the source's), differentiable in source, weights and matrices.

    ``dtype`` is what the products run in; matrices of another dtype are cast piece by piece and their
    gradients come back in their own. ``keep``: the pre-activation is kept for the backward pass; else the up
    projection is computed there once more. Raises ValueError for an unknown backend or activation.
    """
    dtype = source_XD.dtype if dtype is None else dtype
    source_XD, segments = source_XD.to(dtype), rows.segments
    chosen = choose(backend, Case.of(w_down_EFD, dtype, activation, segments.block, keep))
    if chosen == LOOP:
        operands = Operands(source_XD, rows.ids_R, weights_R, w_up_EDP, w_down_EFD, segments, activation)
        return loop.compute(operands) if keep else loop.compute_keeping_inputs(operands)
    useful = None if segments.useful is None else list(segments.useful)
    out_RD, _ = _forward(
        source_XD, rows.ids_R, weights_R, w_up_EDP, w_down_EFD, rows.by_source_N, rows.ends_X,
        segments.counts_E, useful, segments.block, activation, keep, chosen,
    )  # fmt: skip
    return out_RD  # type: ignore[no-any-return]


def _of(arguments: Sequence[Any]) -> tuple[Operands, bool, Backend]:
    """The operands, whether pre-activations are kept, and the backend that the ``arguments`` are."""
    source_XD, ids_R, weights_R, w_up_EDP, w_down_EFD = arguments[:_NAMED]
    counts_E, useful, block, activation, keep, backend = arguments[_TENSORS - 1 :]
    segments = Segments(counts_E, block, useful)
    operands = Operands(source_XD, ids_R, weights_R, w_up_EDP, w_down_EFD, segments, activation)
    return operands, keep, BACKENDS[backend]


@torch.library.custom_op(
    "moetrain::expert_mlp", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor[])"
)
def _forward(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    operands, keep, backend = _of(arguments)
    if not operands.num_rows:  # which not every kernel takes
        return _without_contents(*arguments)  # type: ignore[no-any-return]
    return backend.forward(operands, keep)


@_forward.register_fake
def _without_contents(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """What the forward pass returns, with nothing in it."""
    operands, keep, backend = _of(arguments)
    kept = backend.kept_rows(operands.segments, operands.num_rows, operands.dtype) if keep else []
    return operands.empty_out(), [operands.source_XD.new_empty(n, operands.columns) for n in kept]


@torch.library.custom_op(
    "moetrain::expert_mlp_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor[] kept, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(dout_RD: Tensor, kept: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands, keep, backend = _of(arguments)
    if not operands.num_rows:
        return tuple(torch.zeros_like(t) for t in _differentiable(arguments))  # type: ignore[return-value]
    dx_RD, dweights_R, dw_up_EDP, dw_down_EFD = backend.backward(dout_RD, operands, kept if keep else None)
    by_source_N, ends_X = arguments[_NAMED : _NAMED + 2]
    dsource_XD = torch.ops.moetrain.gather_sum(dx_RD, by_source_N, ends_X, operands.ids_R, arguments[-1])
    return dsource_XD, dweights_R, dw_up_EDP, dw_down_EFD


@_backward.register_fake
def _(dout_RD: Tensor, kept: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t) for t in _differentiable(arguments))  # type: ignore[return-value]


def _differentiable(arguments: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source_XD, _, weights_R, w_up_EDP, w_down_EFD = arguments[:_NAMED]
    return source_XD, weights_R, w_up_EDP, w_down_EFD


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # else backward gets zeros of the size of z
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1])
    ctx.static = inputs[_TENSORS:]


def _autograd_backward(ctx, dout_RD, unused):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: recomputed activations may be unpacked a single time
    tensors, kept = saved[:_TENSORS], list(saved[_TENSORS:])
    dsource, dweights, dw_up, dw_down = _backward(dout_RD.contiguous(), kept, *tensors, *ctx.static)
    return dsource, None, dweights, dw_up, dw_down, *[None] * (_TENSORS - _NAMED + len(ctx.static))


_forward.register_autograd(_autograd_backward, setup_context=_setup)

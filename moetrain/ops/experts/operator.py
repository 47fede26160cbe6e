"""The experts' feed-forward on named rows: gather, up projection, activation, weight, down projection.

Shapes: X source rows, D model, R rows in block-aligned expert order (padding has id -1 and weight 0),
E experts, F hidden, P = 2F (gated) or F, N assignments.

``out[r] = weight[r] * act(source[ids[r]] @ w_up[e]) @ w_down[e]``; where experts have biases, one is added to
each product, and the second is weighted alike. The weight is applied to the hidden rows, so its gradient is
an inner product there and the down projection's output need not be kept (the same identity as SonicMoE's, Guo
et al. 2025). Kept for backward: the source, the ids, the weights, and, with ``keep``, the pre-activation
(z [R, P], or one tensor an expert). All else is computed again.
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
_NAMED, _TENSORS = 7, 10
_ARGUMENTS = (
    "Tensor source, Tensor ids, Tensor weights, Tensor w_up, Tensor w_down, "
    "Tensor? bias_up, Tensor? bias_down, Tensor by_source, Tensor ends, Tensor counts, "
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
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """out [R, D] in ``dtype`` (default: the source's), differentiable in all floating operands.

    ``dtype`` is what the products run in; matrices of another dtype are cast piece by piece and their
    gradients come back in their own. ``keep``: the pre-activation is kept for the backward pass; else the up
    projection is computed there once more. ``biases``: of both projections, [E, P] and [E, D].
    Raises ValueError for an unknown backend or activation.
    """
    dtype = source_XD.dtype if dtype is None else dtype
    source_XD, segments = source_XD.to(dtype), rows.segments
    case = Case.of(w_down_EFD, dtype, activation, segments.block, keep, biases is not None)
    bias_up_EP, bias_down_ED = biases or (None, None)
    chosen = choose(backend, case)
    if chosen == LOOP:
        operands = Operands(
            source_XD, rows.ids_R, weights_R, w_up_EDP, w_down_EFD, segments, activation, *(biases or ())
        )
        return loop.compute(operands) if keep else loop.compute_keeping_inputs(operands)
    useful = None if segments.useful is None else list(segments.useful)
    out_RD, _ = _forward(
        source_XD, rows.ids_R, weights_R, w_up_EDP, w_down_EFD, bias_up_EP, bias_down_ED,
        rows.by_source_N, rows.ends_X, segments.counts_E, useful, segments.block, activation, keep, chosen,
    )  # fmt: skip
    return out_RD  # type: ignore[no-any-return]


def _of(arguments: Sequence[Any]) -> tuple[Operands, bool, Backend]:
    """The operands, whether pre-activations are kept, and the backend that the ``arguments`` are."""
    source_XD, ids_R, weights_R, w_up_EDP, w_down_EFD, *biases = arguments[:_NAMED]
    counts_E, useful, block, activation, keep, backend = arguments[_TENSORS - 1 :]
    segments = Segments(counts_E, block, useful)
    operands = Operands(source_XD, ids_R, weights_R, w_up_EDP, w_down_EFD, segments, activation, *biases)
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
    schema=f"(Tensor dout, Tensor[] kept, {_ARGUMENTS}) -> Tensor[]",
)
def _backward(dout_RD: Tensor, kept: list[Tensor], *arguments: Any) -> list[Tensor]:
    operands, keep, backend = _of(arguments)
    if not operands.num_rows:
        return [torch.zeros_like(t) for t in _differentiable(arguments)]
    dx_RD, *others = backend.backward(dout_RD, operands, kept if keep else None)
    by_source_N, ends_X = arguments[_NAMED : _NAMED + 2]
    dsource_XD = torch.ops.moetrain.gather_sum(dx_RD, by_source_N, ends_X, operands.ids_R, arguments[-1])
    return [dsource_XD, *others]


@_backward.register_fake
def _(dout_RD: Tensor, kept: list[Tensor], *arguments: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t in _differentiable(arguments)]


def _differentiable(arguments: Sequence[Any]) -> list[Tensor]:
    source_XD, _, *others = arguments[:_NAMED]
    return [source_XD, *(tensor for tensor in others if tensor is not None)]


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # else backward gets zeros of the size of z
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1])
    ctx.static = inputs[_TENSORS:]


def _autograd_backward(ctx, dout_RD, unused):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: recomputed activations may be unpacked a single time
    tensors, kept = saved[:_TENSORS], list(saved[_TENSORS:])
    dsource, *others = _backward(dout_RD.contiguous(), kept, *tensors, *ctx.static)
    missing = [None] * (_TENSORS - 2 - len(others) + len(ctx.static))  # of biases that are not there, too
    return dsource, None, *others, *missing


_forward.register_autograd(_autograd_backward, setup_context=_setup)

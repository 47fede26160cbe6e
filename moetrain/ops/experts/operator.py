"""The experts' feed-forward on named rows: gather, up projection, activation, weight, down projection.

Shapes: X source rows, D model, R rows in block-aligned expert order (padding has id -1 and weight 0),
E experts, F hidden, P = 2F (gated) or F, N assignments.

``out[r] = weight[r] * act(source[ids[r]] @ w_up[e]) @ w_down[e]``. The weight is applied to the hidden rows,
so its gradient is an inner product there and the down projection's output need not be kept (the same
identity as SonicMoE's, Guo et al. 2025). Kept for backward: the source, the ids, the weights, and, with
``keep``, the pre-activation (z [R, P], or one tensor an expert). All else is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moetrain.ops.experts import loop
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.operands import Operands, Pair
from moetrain.ops.experts.rows import Rows, Segments
from moetrain.ops.experts.table import BACKENDS, LOOP, Backend, choose
from moetrain.ops.kernel_or_torch import AUTO

# The operator's arguments: operands, then what the rows are, then what is no tensor. The factors of products
# beside the matrices stand before them: a of up, b of up, a of down, b of down; empty where there is none.
_MATRICES, _NAMED, _TENSORS, _ALL = 3, 5, 8, 13
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
    up: Pair | None = None,
    down: Pair | None = None,
) -> Tensor:
    """out [R, D] in ``dtype`` (default: the source's), differentiable in source, weights and matrices.

    ``dtype`` is what the products run in; matrices of another dtype are cast piece by piece and their
    gradients come back in their own. ``keep``: the pre-activation is kept for the backward pass; else the up
    projection is computed there once more. ``up``, ``down``: products that are added to the matrices,
    differentiable in their factors. Raises ValueError for an unknown backend or activation.
    """
    dtype = source_XD.dtype if dtype is None else dtype
    source_XD, segments = source_XD.to(dtype), rows.segments
    added = up is not None or down is not None
    chosen = choose(backend, Case.of(w_down_EFD, dtype, activation, segments.block, keep, added))
    if chosen == LOOP:
        operands = Operands(
            source_XD, rows.ids_R, weights_R, w_up_EDP, w_down_EFD, segments, activation, up, down
        )
        return loop.compute(operands) if keep else loop.compute_keeping_inputs(operands)
    useful = None if segments.useful is None else list(segments.useful)
    arguments = (
        source_XD, rows.ids_R, weights_R, w_up_EDP, w_down_EFD, rows.by_source_N, rows.ends_X,
        segments.counts_E, useful, segments.block, activation, keep, chosen,
    )  # fmt: skip
    out_RD, _ = _forward_added(_factors(up, down, source_XD), *arguments) if added else _forward(*arguments)
    return out_RD  # type: ignore[no-any-return]


def _of(
    arguments: Sequence[Any], up: Pair | None = None, down: Pair | None = None, trained: bool = True
) -> tuple[Operands, bool, Backend]:
    """The operands, whether pre-activations are kept, and the backend that the ``arguments`` are."""
    source_XD, ids_R, weights_R, w_up_EDP, w_down_EFD = arguments[:_NAMED]
    counts_E, useful, block, activation, keep, backend = arguments[_TENSORS - 1 : _ALL]
    segments = Segments(counts_E, block, useful)
    operands = Operands(
        source_XD, ids_R, weights_R, w_up_EDP, w_down_EFD, segments, activation, up, down, trained
    )
    return operands, keep, BACKENDS[backend]


def _factors(up: Pair | None, down: Pair | None, source_XD: Tensor) -> list[Tensor]:
    none = source_XD.new_empty(0)
    pairs = [(none, none) if pair is None else (pair.a_EKL, pair.b_ELN) for pair in (up, down)]
    return [factor for pair in pairs for factor in pair]


def _pairs(factors: Sequence[Tensor], gradients: Sequence[Tensor] = ()) -> tuple[Pair | None, Pair | None]:
    def pair(at: int) -> Pair | None:
        if factors[at].ndim == 1:
            return None
        return Pair(*factors[at : at + 2], *gradients[at : at + 2])

    return pair(0), pair(2)


@torch.library.custom_op(
    "moetrain::expert_mlp", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor[])"
)
def _forward(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    return _run(*_of(arguments))


@torch.library.custom_op(
    "moetrain::expert_mlp_added",
    mutates_args=(),
    schema=f"(Tensor[] factors, {_ARGUMENTS}) -> (Tensor, Tensor[])",
)
def _forward_added(factors: list[Tensor], *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    return _run(*_of(arguments, *_pairs(factors)))


def _run(operands: Operands, keep: bool, backend: Backend) -> tuple[Tensor, list[Tensor]]:
    if not operands.num_rows:  # which not every kernel takes
        return _without_contents(operands, keep, backend)
    return backend.forward(operands, keep)


def _without_contents(operands: Operands, keep: bool, backend: Backend) -> tuple[Tensor, list[Tensor]]:
    """What the forward pass returns, with nothing in it."""
    kept = backend.kept_rows(operands.segments, operands.num_rows, operands.dtype) if keep else []
    return operands.empty_out(), [operands.source_XD.new_empty(n, operands.columns) for n in kept]


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    return _without_contents(*_of(arguments))


@_forward_added.register_fake
def _(factors: list[Tensor], *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    return _without_contents(*_of(arguments))


# ``trained``: whether the matrices' gradients are wanted; they are empty where not.
@torch.library.custom_op(
    "moetrain::expert_mlp_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor[] kept, {_ARGUMENTS}, bool trained=True) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(dout_RD: Tensor, kept: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run_backward(dout_RD, kept, arguments, *_of(arguments, trained=_trained(arguments)))


@torch.library.custom_op(
    "moetrain::expert_mlp_added_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor[] kept, Tensor[] factors, {_ARGUMENTS}, bool trained=True) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
)
def _backward_added(
    dout_RD: Tensor, kept: list[Tensor], factors: list[Tensor], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    gradients = [torch.zeros_like(factor) for factor in factors]
    of = _of(arguments, *_pairs(factors, gradients), trained=_trained(arguments))
    return *_run_backward(dout_RD, kept, arguments, *of), gradients


def _run_backward(
    dout_RD: Tensor,
    kept: list[Tensor],
    arguments: Sequence[Any],
    operands: Operands,
    keep: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not operands.num_rows:
        return _gradients(arguments, torch.zeros_like)
    dx_RD, dweights_R, *dmatrices = backend.backward(dout_RD, operands, kept if keep else None)
    by_source_N, ends_X, name = *arguments[_NAMED : _NAMED + 2], arguments[_ALL - 1]
    dsource_XD = torch.ops.moetrain.gather_sum(dx_RD, by_source_N, ends_X, operands.ids_R, name)
    dup, ddown = dmatrices if operands.trained else (w.new_empty(0) for w in dmatrices)
    return dsource_XD, dweights_R, dup, ddown


@_backward.register_fake
def _(dout_RD: Tensor, kept: list[Tensor], *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(arguments, torch.empty_like)


@_backward_added.register_fake
def _(
    dout_RD: Tensor, kept: list[Tensor], factors: list[Tensor], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    return *_gradients(arguments, torch.empty_like), [torch.empty_like(factor) for factor in factors]


def _trained(arguments: Sequence[Any]) -> bool:
    return bool(arguments[_ALL]) if len(arguments) > _ALL else True


def _gradients(
    arguments: Sequence[Any], like: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the gradients of what is differentiable."""
    source_XD, _, weights_R, *matrices = arguments[:_NAMED]
    up, down = (like(w) if _trained(arguments) else w.new_empty(0) for w in matrices)
    return like(source_XD), like(weights_R), up, down


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # else backward gets zeros of the size of z
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1])
    ctx.static = inputs[_TENSORS:]
    ctx.trained = any(w.requires_grad for w in inputs[_MATRICES:_NAMED])


def _setup_added(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    factors, *arguments = inputs
    _setup(ctx, tuple(arguments), output)
    ctx.factors = len(ctx.to_save)
    ctx.save_for_backward(*ctx.to_save, *factors)


def _autograd_backward(ctx, dout_RD, unused):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: recomputed activations may be unpacked a single time
    tensors, kept = saved[:_TENSORS], list(saved[_TENSORS:])
    found = _backward(dout_RD.contiguous(), kept, *tensors, *ctx.static, ctx.trained)
    return _by_argument(ctx, *found)  # type: ignore[no-untyped-call]


def _autograd_backward_added(ctx, dout_RD, unused):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    tensors, kept, factors = saved[:_TENSORS], list(saved[_TENSORS : ctx.factors]), list(saved[ctx.factors :])
    *found, dfactors = _backward_added(
        dout_RD.contiguous(), kept, factors, *tensors, *ctx.static, ctx.trained
    )
    return dfactors, *_by_argument(ctx, *found)  # type: ignore[no-untyped-call]


def _by_argument(ctx, dsource, dweights, dw_up, dw_down):  # type: ignore[no-untyped-def]
    matrices = (dw_up, dw_down) if ctx.trained else (None, None)
    return dsource, None, dweights, *matrices, *[None] * (_TENSORS - _NAMED + len(ctx.static))


_forward.register_autograd(_autograd_backward, setup_context=_setup)
_forward_added.register_autograd(_autograd_backward_added, setup_context=_setup_added)

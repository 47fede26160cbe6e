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
from moetrain.ops.experts.operands import Operands, Pair
from moetrain.ops.experts.rows import Rows, Segments
from moetrain.ops.experts.table import BACKENDS, LOOP, Backend, choose
from moetrain.ops.kernel_or_torch import AUTO

# The operator's arguments: operands, then what the rows are, then what is no tensor. The factors of products
# beside the matrices stand before them: a of up, b of up, a of down, b of down; empty where there is none.
_MATRICES, _NAMED, _TENSORS, _ALL = 3, 7, 10, 15
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
    up: Pair | None = None,
    down: Pair | None = None,
) -> Tensor:
    """out [R, D] in ``dtype`` (default: the source's), differentiable in all floating operands.

    ``dtype`` is what the products run in; matrices of another dtype are cast piece by piece and their
    gradients come back in their own. ``keep``: the pre-activation is kept for the backward pass; else the up
    projection is computed there once more. ``biases``: of both projections, [E, P] and [E, D]. ``up``,
    ``down``: products that are added to the matrices. Raises ValueError for an unknown backend or activation.
    """
    dtype = source_XD.dtype if dtype is None else dtype
    source_XD, segments = source_XD.to(dtype), rows.segments
    added = up is not None or down is not None
    case = Case.of(w_down_EFD, dtype, activation, segments.block, keep, biases is not None, added)
    bias_up_EP, bias_down_ED = biases or (None, None)
    chosen = choose(backend, case)
    if chosen == LOOP:
        operands = Operands(
            source_XD, rows.ids_R, weights_R, w_up_EDP, w_down_EFD, segments, activation,
            bias_up_EP, bias_down_ED, up, down,
        )  # fmt: skip
        return loop.compute(operands) if keep else loop.compute_keeping_inputs(operands)
    useful = None if segments.useful is None else list(segments.useful)
    arguments = (
        source_XD, rows.ids_R, weights_R, w_up_EDP, w_down_EFD, bias_up_EP, bias_down_ED,
        rows.by_source_N, rows.ends_X, segments.counts_E, useful, segments.block, activation, keep, chosen,
    )  # fmt: skip
    out_RD, _ = _forward_added(_factors(up, down, source_XD), *arguments) if added else _forward(*arguments)
    return out_RD  # type: ignore[no-any-return]


def _of(
    arguments: Sequence[Any], up: Pair | None = None, down: Pair | None = None, trained: bool = True
) -> tuple[Operands, bool, Backend]:
    """The operands, whether pre-activations are kept, and the backend that the ``arguments`` are."""
    source_XD, ids_R, weights_R, w_up_EDP, w_down_EFD, bias_up_EP, bias_down_ED = arguments[:_NAMED]
    counts_E, useful, block, activation, keep, backend = arguments[_TENSORS - 1 : _ALL]
    segments = Segments(counts_E, block, useful)
    operands = Operands(
        source_XD, ids_R, weights_R, w_up_EDP, w_down_EFD, segments, activation,
        bias_up_EP, bias_down_ED, up, down, trained,
    )  # fmt: skip
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


# ``trained``: whether gradients of the matrices and biases are wanted; they are left out where not.
@torch.library.custom_op(
    "moetrain::expert_mlp_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor[] kept, {_ARGUMENTS}, bool trained=True) -> Tensor[]",
)
def _backward(dout_RD: Tensor, kept: list[Tensor], *arguments: Any) -> list[Tensor]:
    return _run_backward(dout_RD, kept, arguments, *_of(arguments, trained=_trained(arguments)))


@torch.library.custom_op(
    "moetrain::expert_mlp_added_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor[] kept, Tensor[] factors, {_ARGUMENTS}, bool trained=True) "
    "-> (Tensor[], Tensor[])",
)
def _backward_added(
    dout_RD: Tensor, kept: list[Tensor], factors: list[Tensor], *arguments: Any
) -> tuple[list[Tensor], list[Tensor]]:
    gradients = [torch.zeros_like(factor) for factor in factors]
    of = _of(arguments, *_pairs(factors, gradients), trained=_trained(arguments))
    return _run_backward(dout_RD, kept, arguments, *of), gradients


def _run_backward(
    dout_RD: Tensor,
    kept: list[Tensor],
    arguments: Sequence[Any],
    operands: Operands,
    keep: bool,
    backend: Backend,
) -> list[Tensor]:
    if not operands.num_rows:
        return [torch.zeros_like(t) for t in _differentiable(arguments)]
    dx_RD, dweights_R, *others = backend.backward(dout_RD, operands, kept if keep else None)
    by_source_N, ends_X, name = *arguments[_NAMED : _NAMED + 2], arguments[_ALL - 1]
    dsource_XD = torch.ops.moetrain.gather_sum(dx_RD, by_source_N, ends_X, operands.ids_R, name)
    return [dsource_XD, dweights_R, *(others if operands.trained else ())]


@_backward.register_fake
def _(dout_RD: Tensor, kept: list[Tensor], *arguments: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t in _differentiable(arguments)]


@_backward_added.register_fake
def _(
    dout_RD: Tensor, kept: list[Tensor], factors: list[Tensor], *arguments: Any
) -> tuple[list[Tensor], list[Tensor]]:
    gradients = [torch.empty_like(t) for t in _differentiable(arguments)]
    return gradients, [torch.empty_like(factor) for factor in factors]


def _trained(arguments: Sequence[Any]) -> bool:
    return bool(arguments[_ALL]) if len(arguments) > _ALL else True


def _differentiable(arguments: Sequence[Any]) -> list[Tensor]:
    """What a backward pass returns the gradients of."""
    source_XD, _, weights_R, *others = arguments[:_NAMED]
    wanted = others if _trained(arguments) else []
    return [source_XD, weights_R, *(tensor for tensor in wanted if tensor is not None)]


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # else backward gets zeros of the size of z
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1])
    ctx.static = inputs[_TENSORS:]
    ctx.trained = any(w is not None and w.requires_grad for w in inputs[_MATRICES:_NAMED])


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
    found, dfactors = _backward_added(dout_RD.contiguous(), kept, factors, *tensors, *ctx.static, ctx.trained)
    return dfactors, *_by_argument(ctx, *found)  # type: ignore[no-untyped-call]


def _by_argument(ctx, dsource, *others):  # type: ignore[no-untyped-def]
    missing = _TENSORS - 2 - len(others) + len(ctx.static)  # of what is not trained or not there, too
    return dsource, None, *others, *[None] * missing


_forward.register_autograd(_autograd_backward, setup_context=_setup)
_forward_added.register_autograd(_autograd_backward_added, setup_context=_setup_added)

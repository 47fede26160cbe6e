"""The experts' feed-forward on named rows: gather, up projection, activation, weight, down projection.

Shapes: X source rows, D model, R rows in block-aligned expert order (padding has id -1 and weight 0),
E experts, F hidden, P = 2F (gated) or F, N assignments.

``out[r] = weight[r] * act(source[ids[r]] @ w_up[e]) @ w_down[e]``. The weight is applied to the hidden rows,
so its gradient is an inner product there and the down projection's output need not be kept (the same
identity as SonicMoE's, Guo et al. 2025). Kept for backward: the source, the ids, the weights, the
pre-activation (z [R, P], or one tensor an expert). Gather, activation and weighting are recomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.ops.experts import loop
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.rows import Rows, Segments
from moetrain.ops.experts.table import BACKENDS, LOOP, choose
from moetrain.ops.kernel_or_torch import AUTO

_TENSORS = 8  # arguments of the operator: five operands, then what the rows are


def expert_mlp(
    source_XD: Tensor,
    rows: Rows,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    activation: str,
    backend: str = AUTO,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """out [R, D] in ``dtype`` (default: the source's), differentiable in source, weights and matrices.

    ``dtype`` is what the products run in; matrices of another dtype are cast piece by piece and their
    gradients come back in their own. Raises ValueError for an unknown backend or activation.
    """
    dtype = source_XD.dtype if dtype is None else dtype
    source_XD = source_XD.to(dtype)
    chosen = choose(backend, Case.of(w_down_EFD, dtype, activation, rows.segments.block))
    if chosen == LOOP:
        return loop.compute(source_XD, rows, weights_R, w_up_EDP, w_down_EFD, activation)
    segments = rows.segments
    useful = None if segments.useful is None else list(segments.useful)
    out_RD, _ = _forward(
        source_XD, rows.ids_R, weights_R, w_up_EDP, w_down_EFD, rows.by_source_N, rows.ends_X,
        segments.counts_E, useful, segments.block, activation, chosen,
    )  # fmt: skip
    return out_RD  # type: ignore[no-any-return]


@torch.library.custom_op("moetrain::expert_mlp", mutates_args=())
def _forward(
    source_XD: Tensor,
    ids_R: Tensor,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    by_source_N: Tensor,
    ends_X: Tensor,
    counts_E: Tensor,
    useful: list[int] | None,
    block: int,
    activation: str,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    segments = Segments(counts_E, block, useful)
    if not ids_R.shape[0]:  # which not every kernel takes
        return _without_contents(source_XD, ids_R, w_up_EDP, w_down_EFD, segments, backend)
    return BACKENDS[backend].forward(source_XD, ids_R, weights_R, w_up_EDP, w_down_EFD, segments, activation)


@_forward.register_fake
def _(
    source_XD: Tensor, ids_R: Tensor, weights_R: Tensor, w_up_EDP: Tensor, w_down_EFD: Tensor,
    by_source_N: Tensor, ends_X: Tensor, counts_E: Tensor, useful: list[int] | None, block: int,
    activation: str, backend: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    segments = Segments(counts_E, block, useful)
    return _without_contents(source_XD, ids_R, w_up_EDP, w_down_EFD, segments, backend)


def _without_contents(
    source_XD: Tensor, ids_R: Tensor, w_up_EDP: Tensor, w_down_EFD: Tensor, segments: Segments, backend: str
) -> tuple[Tensor, list[Tensor]]:
    """What the forward pass returns, with nothing in it."""
    kept = BACKENDS[backend].kept_rows(segments, ids_R.shape[0], source_XD.dtype)
    pre_activations = [source_XD.new_empty(n, w_up_EDP.shape[2]) for n in kept]
    return source_XD.new_empty(ids_R.shape[0], w_down_EFD.shape[2]), pre_activations


@torch.library.custom_op("moetrain::expert_mlp_backward", mutates_args=())
def _backward(
    dout_RD: Tensor,
    source_XD: Tensor,
    ids_R: Tensor,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    kept: list[Tensor],
    by_source_N: Tensor,
    ends_X: Tensor,
    counts_E: Tensor,
    useful: list[int] | None,
    block: int,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not ids_R.shape[0]:
        operands = (source_XD, weights_R, w_up_EDP, w_down_EFD)
        return tuple(torch.zeros_like(t) for t in operands)  # type: ignore[return-value]
    segments = Segments(counts_E, block, useful)
    dx_RD, dweights_R, dw_up_EDP, dw_down_EFD = BACKENDS[backend].backward(
        dout_RD, source_XD, ids_R, weights_R, w_up_EDP, w_down_EFD, kept, segments, activation
    )
    dsource_XD = torch.ops.moetrain.gather_sum(dx_RD, by_source_N, ends_X, ids_R, backend)
    return dsource_XD, dweights_R, dw_up_EDP, dw_down_EFD


@_backward.register_fake
def _(
    dout_RD: Tensor, source_XD: Tensor, ids_R: Tensor, weights_R: Tensor, w_up_EDP: Tensor,
    w_down_EFD: Tensor, kept: list[Tensor], by_source_N: Tensor, ends_X: Tensor, counts_E: Tensor,
    useful: list[int] | None, block: int, activation: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(torch.empty_like(t) for t in (source_XD, weights_R, w_up_EDP, w_down_EFD))  # type: ignore


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    operands, static = inputs[:_TENSORS], inputs[_TENSORS:]
    ctx.set_materialize_grads(False)  # else backward gets zeros of the size of z
    ctx.save_for_backward(*operands, *output[1])
    ctx.static = static


def _autograd_backward(ctx, dout_RD, unused):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: recomputed activations may be unpacked a single time
    named, indices = saved[:5], saved[5:_TENSORS]
    grads = _backward(dout_RD.contiguous(), *named, list(saved[_TENSORS:]), *indices, *ctx.static)
    dsource, dweights, dw_up, dw_down = grads
    return dsource, None, dweights, dw_up, dw_down, *[None] * (_TENSORS - 5 + len(ctx.static))


_forward.register_autograd(_autograd_backward, setup_context=_setup)

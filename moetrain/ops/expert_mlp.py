"""The experts' feed-forward on named rows: gather, up projection, activation, weight, down projection.

Shapes: X source rows, D model, R rows in block-aligned expert order (padding has id -1 and weight 0),
E experts, F hidden, P = 2F (gated) or F, N assignments.

``out[r] = weight[r] * act(source[ids[r]] @ w_up[e]) @ w_down[e]``. The weight is applied to the hidden rows,
so its gradient is an inner product there and the down projection's output need not be kept (the same
identity as SonicMoE's, Guo et al. 2025). Kept for backward: the source, the ids, the weights, the
pre-activation (z [R, P], or one tensor an expert). Gather, activation and weighting are recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.ops import grouped
from moetrain.ops.activations import activate, gate_and_up
from moetrain.ops.cpu import per_expert
from moetrain.ops.gather_sum import gather_rows
from moetrain.ops.grouped_mm import grouped_mm, refusal, say_once

BACKENDS = ("auto", "loop", "torch", "cpu")


@dataclass(frozen=True)
class Rows:
    """Which source row each computed row is, and back.

    ids_R      int64, source row of each computed row, -1 for padding.
    useful     rows of each expert without padding, host integers.
    aligned    rows of each expert with padding; sums to R.
    by_source_N  computed rows grouped by their source row; ends_X closes each group.
    """

    ids_R: Tensor
    useful: Sequence[int]
    aligned: Sequence[int]
    by_source_N: Tensor
    ends_X: Tensor


def expert_mlp(
    source_XD: Tensor,
    rows: Rows,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    activation: str,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """out [R, D] in ``dtype`` (default: the source's), differentiable in source, weights and matrices.

    ``dtype`` is what the products run in; matrices of another dtype are cast piece by piece and their
    gradients come back in their own.
    """
    dtype = source_XD.dtype if dtype is None else dtype
    source_XD = source_XD.to(dtype)
    if backend not in BACKENDS:
        raise ValueError(f"unknown experts backend {backend!r}; known: {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "cpu" if source_XD.device.type == "cpu" else "torch"
    if backend == "loop":
        return _oracle(source_XD, rows, weights_R, w_up_EDP, w_down_EFD, activation)
    if backend == "torch":
        reason = refusal(rows.ids_R[:, None].to(dtype).expand(-1, source_XD.shape[1]), w_up_EDP)
        reason = reason or refusal(weights_R[:, None].to(dtype).expand(-1, w_down_EFD.shape[1]), w_down_EFD)
        if reason is not None:
            say_once(f"experts backend torch: {reason}; running one product per expert")
            backend = "cpu"
    out_RD, _ = _forward(
        source_XD, rows.ids_R, weights_R, w_up_EDP, w_down_EFD, rows.by_source_N, rows.ends_X,
        list(rows.useful), list(rows.aligned), activation, backend,
    )  # fmt: skip
    return out_RD  # type: ignore[no-any-return]


def _oracle(
    source_XD: Tensor, rows: Rows, weights_R: Tensor, w_up_EDP: Tensor, w_down_EFD: Tensor, activation: str
) -> Tensor:
    dtype = source_XD.dtype
    x_RD = gather_rows(source_XD, rows.ids_R)
    z_RP = grouped_mm(x_RD, w_up_EDP.to(dtype), rows.aligned, "loop")
    h_RF = activate(*gate_and_up(z_RP, activation), activation)
    out_RD = grouped_mm(h_RF, w_down_EFD.to(dtype), rows.aligned, "loop")
    return (out_RD * weights_R[:, None]).to(dtype)


@torch.library.custom_op("moetrain::expert_mlp", mutates_args=())
def _forward(
    source_XD: Tensor,
    ids_R: Tensor,
    weights_R: Tensor,
    w_up_EDP: Tensor,
    w_down_EFD: Tensor,
    by_source_N: Tensor,
    ends_X: Tensor,
    useful: list[int],
    aligned: list[int],
    activation: str,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    module = per_expert if backend == "cpu" else grouped
    out: tuple[Tensor, list[Tensor]] = module.forward(
        source_XD, ids_R, weights_R, w_up_EDP, w_down_EFD, useful, aligned, activation
    )
    return out


@_forward.register_fake
def _(
    source_XD: Tensor, ids_R: Tensor, weights_R: Tensor, w_up_EDP: Tensor, w_down_EFD: Tensor,
    by_source_N: Tensor, ends_X: Tensor, useful: list[int], aligned: list[int], activation: str, backend: str,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    rows = ids_R.shape[0]
    kept = per_expert.kept_rows(useful, aligned, source_XD.dtype) if backend == "cpu" else [rows]
    pre_activations = [source_XD.new_empty(n, w_up_EDP.shape[2]) for n in kept]
    return source_XD.new_empty(rows, w_down_EFD.shape[2]), pre_activations


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
    useful: list[int],
    aligned: list[int],
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = per_expert if backend == "cpu" else grouped
    dx_RD, dweights_R, dw_up_EDP, dw_down_EFD = module.backward(
        dout_RD, source_XD, ids_R, weights_R, w_up_EDP, w_down_EFD, kept, useful, aligned, activation
    )
    dsource_XD = torch.ops.moetrain.gather_sum(dx_RD, by_source_N, ends_X, ids_R)
    return dsource_XD, dweights_R, dw_up_EDP, dw_down_EFD


@_backward.register_fake
def _(
    dout_RD: Tensor, source_XD: Tensor, ids_R: Tensor, weights_R: Tensor, w_up_EDP: Tensor,
    w_down_EFD: Tensor, kept: list[Tensor], by_source_N: Tensor, ends_X: Tensor, useful: list[int],
    aligned: list[int], activation: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(torch.empty_like(t) for t in (source_XD, weights_R, w_up_EDP, w_down_EFD))  # type: ignore


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    source_XD, ids_R, weights_R, w_up, w_down, by_source_N, ends_X, *static = inputs
    ctx.set_materialize_grads(False)  # else backward gets zeros of the size of z
    ctx.save_for_backward(source_XD, ids_R, weights_R, w_up, w_down, by_source_N, ends_X, *output[1])
    ctx.static = static


def _autograd_backward(ctx, dout_RD, unused):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: recomputed activations may be unpacked a single time
    *named, by_source_N, ends_X = saved[:7]
    grads = _backward(dout_RD.contiguous(), *named, list(saved[7:]), by_source_N, ends_X, *ctx.static)
    dsource, dweights, dw_up, dw_down = grads
    return dsource, None, dweights, dw_up, dw_down, None, None, None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup)

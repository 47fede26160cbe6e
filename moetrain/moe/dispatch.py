"""Who computes which row. Rows are named, not copied: the experts' operator gathers them itself.

Shapes: T tokens, D model, E experts overall, e experts here, N assignments, n of them to feed-forward
networks, X source rows, R computed rows, block-aligned by expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moetrain.moe.assign import stable_order
from moetrain.moe.routing import Routing
from moetrain.ops import Rows, gather_sum

_BLOCK = {"cpu": 32}
_BLOCK_GPU = 128


@dataclass(frozen=True)
class Dispatched:
    """What the experts compute: ``rows`` names rows of ``source_XD``; each carries its weight.

    counts_e are useful rows (no padding) of the experts that live here, host integers.
    """

    source_XD: Tensor
    rows: Rows
    weights_R: Tensor
    counts_e: list[int]
    plan: Plan


@dataclass(frozen=True)
class Plan:
    """How computed rows return to tokens; a value, never kept on the dispatcher."""

    rows: Rows
    scale_R: Tensor | None  # multiplies the forward only


class Dispatcher(Protocol):
    """``combine(experts(dispatch(x, routing)), plan)`` is the layer's output."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched: ...

    def combine(self, out_RD: Tensor, plan: Plan) -> Tensor: ...


class LocalDispatcher:
    """All experts on this process: the source is x itself, and nothing travels.

    One host synchronisation a call: the counts, from which the row layout follows.
    """

    def __init__(self, block: int | None = None) -> None:
        if block is not None and block < 1:
            raise ValueError(
                f"experts.block={block} must be at least 1 row, or null for the device's default"
            )
        self.block = block

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        block = self.block or _BLOCK.get(x_TD.device.type, _BLOCK_GPU)
        rows, slots_N = layout(routing, x_TD.shape[0], block)
        size = rows.ids_R.shape[0]
        here = slice(slots_N.shape[0])  # zero-computation experts come last, and do without rows
        weights_R = routing.weights_N.new_zeros(size).scatter(0, slots_N, routing.weights_N[here])
        scale_N = routing.forward_scale_N
        scale_R = None if scale_N is None else scale_N.new_ones(size).scatter(0, slots_N, scale_N[here])
        return Dispatched(x_TD, rows, weights_R, list(rows.useful), Plan(rows, scale_R))

    def combine(self, out_RD: Tensor, plan: Plan) -> Tensor:
        """y [T, D]: each token's rows summed in expert order; tokens without rows get zeros."""
        if plan.scale_R is not None:
            # the value is scaled, the gradient is not (gradient estimators for a discrete choice)
            out_RD = out_RD + (out_RD * (plan.scale_R[:, None] - 1)).detach().to(out_RD.dtype)
        return gather_sum(out_RD, plan.rows.by_source_N, plan.rows.ends_X, plan.rows.ids_R)


def layout(routing: Routing, num_source: int, block: int) -> tuple[Rows, Tensor]:
    """The block-aligned rows of a routing, and the row of each feed-forward assignment, int64 [n].

    Each expert's segment is rounded up to a multiple of ``block``; padding rows have id -1.
    """
    counts_E = routing.counts_E[: routing.num_ffn_experts]
    useful = counts_E.tolist()
    aligned = [-(-count // block) * block for count in useful]
    tokens_N = routing.token_ids_N[: sum(useful)]
    device = tokens_N.device
    starts, rows_before, total = [], 0, 0
    for count, width in zip(useful, aligned, strict=True):
        starts.append(total - rows_before)  # what aligning has added in front of this expert
        rows_before, total = rows_before + count, total + width
    shift_N = torch.repeat_interleave(
        torch.tensor(starts, device=device), counts_E, output_size=tokens_N.shape[0]
    )
    slots_N = torch.arange(tokens_N.shape[0], device=device) + shift_N
    ids_R = torch.full((total,), -1, device=device).scatter_(0, slots_N, tokens_N)
    by_source_N = slots_N.gather(0, stable_order(tokens_N, num_source))
    ends_X = torch.bincount(tokens_N, minlength=num_source).cumsum(0)
    return Rows(ids_R, useful, aligned, by_source_N, ends_X), slots_N

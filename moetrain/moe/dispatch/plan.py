"""The plan of rows: which source rows each expert computes, and how results return to their source.

Rows are named, not copied: the experts' operator gathers them itself.

Shapes: E experts, N assignments sorted by expert, X source rows, R computed rows, block-aligned by expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.moe.assign import count, stable_order
from moetrain.moe.assignment import Assignment
from moetrain.ops import Rows, Segments, gather_sum


@dataclass(frozen=True)
class Plan:
    """Computed rows, the routing weight of each (0 on padding), and the factor of its value forward.

    ``backend``: ``experts.backend``, which sums follow.
    """

    rows: Rows
    weights_R: Tensor
    scale_R: Tensor | None
    backend: str


def sum_by_source(out_RD: Tensor, plan: Plan) -> Tensor:
    """Each source row's computed rows, scaled, summed in expert order: [X, D]."""
    if plan.scale_R is not None:
        # the value is scaled, the gradient is not (gradient estimators for a discrete choice)
        out_RD = out_RD + (out_RD * (plan.scale_R[:, None] - 1)).detach().to(out_RD.dtype)
    return gather_sum(out_RD, plan.rows.by_source_N, plan.rows.ends_X, plan.rows.ids_R, plan.backend)


def place(
    assignment: Assignment, useful: list[int] | None, num_source: int, block: int, backend: str
) -> Plan:
    """The plan of an assignment whose tokens are source rows; ``useful``: as in :func:`layout`."""
    rows, slots_N = layout(assignment.token_ids_N, assignment.counts_E, useful, num_source, block)
    weights_N, scale_N = assignment.weights_N, assignment.forward_scale_N
    size = rows.ids_R.shape[0]
    weights_R = weights_N.new_zeros(size).scatter(0, slots_N, weights_N)
    scale_R = None if scale_N is None else scale_N.new_ones(size).scatter(0, slots_N, scale_N)
    return Plan(rows, weights_R, scale_R, backend)


def layout(
    sources_N: Tensor, counts_E: Tensor, useful: list[int] | None, num_source: int, block: int
) -> tuple[Rows, Tensor]:
    """The block-aligned rows of assignments sorted by expert, and the row of each, int64 [N].

    ``counts_E`` of them go to each expert; ``useful`` are the same numbers on the host, or None: then nothing
    waits for them, and there are as many rows as they can need. Each expert's segment is rounded up to a
    multiple of ``block``; padding rows have id -1.
    """
    segments = Segments(counts_E, block, useful)
    size = segments.bound(sources_N.shape[0]) if useful is None else sum(segments.aligned)
    device = sources_N.device
    added_E = -counts_E % block
    shift_E = added_E.cumsum(0) - added_E  # what aligning adds in front of each expert
    shift_N = torch.repeat_interleave(shift_E, counts_E, output_size=sources_N.shape[0])
    slots_N = torch.arange(sources_N.shape[0], device=device) + shift_N
    ids_R = torch.full((size,), -1, device=device).scatter_(0, slots_N, sources_N)
    by_source_N = slots_N.gather(0, stable_order(sources_N, num_source))
    ends_X = count(sources_N, num_source).cumsum(0)
    return Rows(ids_R, segments, by_source_N, ends_X), slots_N

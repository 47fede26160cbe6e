"""Who computes which row. Rows are named, not copied: the experts' operator gathers them itself.

Shapes: T tokens, D model, E experts overall, e experts here, N assignments, n of them to feed-forward
networks, X source rows, R computed rows, block-aligned by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from moetrain.moe.assign import count, stable_order
from moetrain.moe.routing import Routing
from moetrain.ops import Rows, gather_sum

_BLOCK = {"cpu": 32}
_BLOCK_GPU = 128
B = TypeVar("B")


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


class Chunks(Protocol):
    """Rows that come by chunks of experts, ``sizes`` of them, and leave by chunks."""

    @property
    def sizes(self) -> list[int]: ...

    def arrivals(self) -> Iterator[Dispatched]:
        """Each chunk's rows as soon as they are here."""
        ...

    def give_back(self, out_RD: Tensor, chunk: int) -> Tensor: ...


Compute = Callable[[Any], Any]  # Dispatched -> out [R, D]; Chunks -> what give_back returns, by chunk


class Dispatcher(Protocol):
    """``dispatch`` sets rows on their way, ``compute`` makes of them the layer's output."""

    block: int | None  # rows that each expert's segment is rounded up to; None: the device's default

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Any: ...

    def compute(self, dispatched: Any, experts: Compute, meanwhile: Callable[[], B]) -> tuple[Tensor, B]:
        """y [T, D], and what ``meanwhile`` returns, which is called while rows travel."""
        ...

    def agree(self, rounds: int) -> int:
        """The most of any rank that dispatches together with this one."""
        ...


class LocalDispatcher:
    """All experts on this process: the source is x itself, and nothing travels.

    One host synchronisation a call: the counts, from which the row layout follows, unless they are known.
    """

    def __init__(self, block: int | None = None) -> None:
        if block is not None and block < 1:
            raise ValueError(
                f"experts.block={block} must be at least 1 row, or null for the device's default"
            )
        self.block = block

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        counts_E = routing.counts_E[: routing.num_ffn_experts]
        useful = routing.counts_on_host()[: routing.num_ffn_experts]
        tokens_N = routing.token_ids_N[: sum(useful)]
        here = slice(tokens_N.shape[0])  # zero-computation experts come last, and do without rows
        scale_N = routing.forward_scale_N
        plan, weights_R = place(
            tokens_N, routing.weights_N[here], None if scale_N is None else scale_N[here],
            counts_E, useful, x_TD.shape[0], block_of(x_TD, self.block),
        )  # fmt: skip
        return Dispatched(x_TD, plan.rows, weights_R, useful, plan)

    def compute(
        self, dispatched: Dispatched, experts: Compute, meanwhile: Callable[[], B]
    ) -> tuple[Tensor, B]:
        return self.combine(experts(dispatched), dispatched.plan), meanwhile()

    def agree(self, rounds: int) -> int:
        return rounds

    def combine(self, out_RD: Tensor, plan: Plan) -> Tensor:
        """y [T, D]: each token's rows summed in expert order; tokens without rows get zeros."""
        return sum_by_source(out_RD, plan)


def sum_by_source(out_RD: Tensor, plan: Plan) -> Tensor:
    """Each source row's computed rows, scaled, summed in expert order: [X, D]."""
    if plan.scale_R is not None:
        # the value is scaled, the gradient is not (gradient estimators for a discrete choice)
        out_RD = out_RD + (out_RD * (plan.scale_R[:, None] - 1)).detach().to(out_RD.dtype)
    return gather_sum(out_RD, plan.rows.by_source_N, plan.rows.ends_X, plan.rows.ids_R)


def block_of(x: Tensor, block: int | None) -> int:
    """Rows of a block: as asked, or the device's default."""
    return block or _BLOCK.get(x.device.type, _BLOCK_GPU)


def place(
    sources_N: Tensor,
    weights_N: Tensor,
    scale_N: Tensor | None,
    counts_E: Tensor,
    useful: list[int],
    num_source: int,
    block: int,
) -> tuple[Plan, Tensor]:
    """The plan of assignments sorted by expert, of which each names its source row, and weights [R]."""
    rows, slots_N = layout(sources_N, counts_E, useful, num_source, block)
    size = rows.ids_R.shape[0]
    weights_R = weights_N.new_zeros(size).scatter(0, slots_N, weights_N)
    scale_R = None if scale_N is None else scale_N.new_ones(size).scatter(0, slots_N, scale_N)
    return Plan(rows, scale_R), weights_R


def layout(
    tokens_N: Tensor, counts_E: Tensor, useful: list[int], num_source: int, block: int
) -> tuple[Rows, Tensor]:
    """The block-aligned rows of assignments sorted by expert, and the row of each, int64 [N].

    ``counts_E`` of them go to each expert; ``useful`` are the same numbers on the host. Each expert's segment
    is rounded up to a multiple of ``block``; padding rows have id -1.
    """
    aligned = [-(-rows // block) * block for rows in useful]
    device = tokens_N.device
    added_E = -counts_E % block
    shift_E = added_E.cumsum(0) - added_E  # what aligning adds in front of each expert
    shift_N = torch.repeat_interleave(shift_E, counts_E, output_size=tokens_N.shape[0])
    slots_N = torch.arange(tokens_N.shape[0], device=device) + shift_N
    ids_R = torch.full((sum(aligned),), -1, device=device).scatter_(0, slots_N, tokens_N)
    by_source_N = slots_N.gather(0, stable_order(tokens_N, num_source))
    ends_X = count(tokens_N, num_source).cumsum(0)
    return Rows(ids_R, useful, aligned, by_source_N, ends_X), slots_N

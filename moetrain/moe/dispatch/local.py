"""The dispatcher of one process: it has all experts, the source is x itself, and no row is sent.

Shapes: T tokens, D model, R computed rows, block-aligned by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from moetrain.moe.assignment import Assignment
from moetrain.moe.dispatch.base import Dispatcher, ExpertRows, Work
from moetrain.moe.dispatch.plan import Plan, place, sum_by_source


@dataclass(frozen=True)
class LocalWork(Work):
    """One chunk, of all experts."""

    x_TD: Tensor
    plan: Plan

    @property
    def sizes(self) -> list[int]:
        return [self.plan.rows.segments.num_experts]

    def arrivals(self) -> Iterator[ExpertRows]:
        yield ExpertRows(self.x_TD, self.plan.rows, self.plan.weights_R)

    def done(self, out_RD: Tensor, chunk: int) -> Tensor:
        return out_RD

    def combine(self, done: Sequence[Tensor]) -> Tensor:
        (out_RD,) = done
        return sum_by_source(out_RD, self.plan)


class LocalDispatcher(Dispatcher):
    """The host waits once a call for counts, if ``needs_counts(x, block)``, and the router did not.

    Experts without a network are cut off by their number, so that a layer with them needs the counts too.
    """

    def __init__(
        self, block: int | None = None, needs_counts: Callable[[Tensor, int], bool] = lambda x, block: True
    ) -> None:
        super().__init__(block)
        self.needs_counts = needs_counts

    def dispatch(self, x_TD: Tensor, assignment: Assignment) -> LocalWork:
        useful, block = None, self.block_of(x_TD, assignment, len(assignment.ffn_counts_e))
        if assignment.num_ffn_experts is not None or self.needs_counts(x_TD, block):
            useful = assignment.counts_on_host()[: assignment.num_ffn_experts]
            assignment = assignment.to_ffn(sum(useful))
        plan = place(assignment, useful, x_TD.shape[0], block, self.backend)
        return LocalWork(x_TD, plan)

    def whole(self, rows_eD: Tensor) -> Tensor:
        return rows_eD

    def agree(self, rounds: int) -> int:
        return rounds

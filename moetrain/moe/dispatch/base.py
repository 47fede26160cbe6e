"""The interface of dispatchers, which bring a layer's tokens to experts and their results back.

``work = dispatcher.dispatch(x, assignment)``, ``out = experts(work)``, ``y = dispatcher.combine(out, work)``:
the same for one process and for ranks. What a layer computes between dispatch and experts overlaps with rows
that travel.

Shapes: T tokens, D model, X source rows, R computed rows, block-aligned by expert, E experts, e of this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from moetrain.moe.assignment import Assignment
from moetrain.ops import Rows
from moetrain.ops.experts.blocks import usual_block
from moetrain.ops.kernel_or_torch import AUTO
from moetrain.ops.precision import product_dtype


@dataclass(frozen=True)
class ExpertRows:
    """The rows of a chunk of experts: ``rows`` indexes ``source_XD``; ``weights_R``: routing weights."""

    source_XD: Tensor
    rows: Rows
    weights_R: Tensor


class Work(ABC):
    """One dispatch: the rows of this rank's experts, in chunks of whole experts. It is used once."""

    @property
    @abstractmethod
    def sizes(self) -> list[int]:
        """The number of experts in each chunk, in the order of this rank's experts."""

    @abstractmethod
    def arrivals(self) -> Iterator[ExpertRows]:
        """Yield the rows of each chunk, in order; waits until they are on this rank."""

    @abstractmethod
    def done(self, out_RD: Tensor, chunk: int) -> Tensor:
        """Take the result [R, D] of a chunk, by its number; returns its part of :meth:`combine`'s input."""

    @abstractmethod
    def combine(self, done: Sequence[Tensor]) -> Tensor:
        """y [T, D]: each token's rows summed in expert order; tokens without rows get zeros."""


class Dispatcher(ABC):
    """Brings tokens to the ranks of their experts, and results back.

    ``block``: each expert's rows are padded to a multiple of it, 1 or more; None: see :meth:`block_of`.
    ``backend``: ``experts.backend`` of its layer, which sums of rows follow.
    """

    def __init__(self, block: int | None = None) -> None:
        self.block, self.backend = block, AUTO

    def block_of(self, x_TD: Tensor, assignment: Assignment, experts: int) -> int:
        """The rows of a block: what was asked for, or what suits the mean rows of the ``experts`` here.

        All ranks are taken to send as many assignments as this one, which is known without a wait.
        """
        if self.block is not None:
            return self.block
        return usual_block(x_TD.device, product_dtype(x_TD), assignment.token_ids_N.shape[0], experts)

    @abstractmethod
    def dispatch(self, x_TD: Tensor, assignment: Assignment) -> Work:
        """Start to send the rows of ``x_TD`` to the experts of ``assignment``."""

    def combine(self, done: Sequence[Tensor], work: Work) -> Tensor:
        """y [T, D]. ``done``: what the experts returned for ``work``, a tensor a chunk."""
        return work.combine(done)

    @abstractmethod
    def whole(self, rows_eD: Tensor) -> Tensor:
        """[E, D], in the order of experts: what each rank has of its own ones, alike on all; differentiable.

        Gradients of all ranks that have the experts in common are summed.
        """

    @abstractmethod
    def agree(self, rounds: int) -> int:
        """The largest number of rounds among the ranks that dispatch together with this one."""

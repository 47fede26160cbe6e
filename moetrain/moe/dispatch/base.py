"""The seam between a layer and whatever brings its tokens to experts and back.

``work = dispatcher.dispatch(x, assignment)``, ``out = experts(work)``, ``y = dispatcher.combine(out, work)``:
the same for one process and for ranks. What a layer computes between dispatch and experts overlaps with rows
that travel.

Shapes: T tokens, D model, X source rows, R computed rows, block-aligned by expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from moetrain.moe.assignment import Assignment
from moetrain.ops import Rows


@dataclass(frozen=True)
class ExpertRows:
    """What some experts compute: ``rows`` names rows of ``source_XD``; each carries its routing weight."""

    source_XD: Tensor
    rows: Rows
    weights_R: Tensor


class Work(ABC):
    """One dispatch: the rows of this rank's experts, in chunks of whole experts. A value, used once."""

    @property
    @abstractmethod
    def sizes(self) -> list[int]:
        """Experts of each chunk, in the order of this rank's experts."""

    @abstractmethod
    def arrivals(self) -> Iterator[ExpertRows]:
        """The rows of each chunk, as soon as they are on this rank."""

    @abstractmethod
    def done(self, out_RD: Tensor, chunk: int) -> Tensor:
        """Take the result of a chunk; returns what :meth:`combine` wants of it."""

    @abstractmethod
    def combine(self, done: Sequence[Tensor]) -> Tensor:
        """y [T, D]: each token's rows summed in expert order; tokens without rows get zeros."""


class Dispatcher(ABC):
    """Brings tokens to the ranks of their experts. ``block``: rows that each expert's segment is rounded up
    to; None: the device's default.

    Raises ValueError for a ``block`` below 1.
    """

    def __init__(self, block: int | None = None) -> None:
        if block is not None and block < 1:
            raise ValueError(
                f"experts.block={block} must be at least 1 row, or null for the device's default"
            )
        self.block = block

    @abstractmethod
    def dispatch(self, x_TD: Tensor, assignment: Assignment) -> Work:
        """Send the rows of ``x_TD`` towards their experts."""

    def combine(self, done: Sequence[Tensor], work: Work) -> Tensor:
        """y [T, D] of what the experts made of ``work``."""
        return work.combine(done)

    @abstractmethod
    def agree(self, rounds: int) -> int:
        """The most rounds of any rank that dispatches together with this one."""

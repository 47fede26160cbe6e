"""The ranks that handle checkpoints together, and how they come to one verdict."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist

from moetrain.errors import UserError
from moetrain.parallel.lost import raising_peer_lost

_TIMEOUT = timedelta(hours=1)  # a dead rank closes its connections and is noticed at once
T = TypeVar("T")


class Peers:
    """The ranks that save and load together, over a gloo group of their own: making one is collective.

    The group is not the training's, whose collectives may run at the same time and whose time-out is shorter
    than a large checkpoint may take. ``group`` None means all ranks; without a process group there is one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.world = 0, 1
        if not (dist.is_available() and dist.is_initialized()):
            return
        ranks = dist.get_process_group_ranks(group)
        self.group = cast(dist.ProcessGroup, dist.new_group(ranks, timeout=_TIMEOUT, backend="gloo"))
        self.rank, self.world = dist.get_rank(self.group), len(ranks)

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank, on every rank, in rank order."""
        if self.world == 1:
            return [value]
        values = cast(list[T], [None] * self.world)
        with raising_peer_lost("handling a checkpoint"):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make()`` returns on rank 0, on every rank; a UserError that it raises, on every rank."""
        value, error = None, None
        if self.rank == 0:
            try:
                value = make()
            except UserError as failure:
                error = str(failure)
        self.raise_together(error)
        return cast(T, self.gather(value)[0])

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, done by every rank; a UserError of any rank is raised on all."""
        try:
            value, error = [work()], None
        except UserError as found:
            value, error = [], str(found)
        self.raise_together(error)
        return value[0]

    def raise_together(self, error: str | None) -> None:
        """Raise UserError with the first rank's error on every rank when any rank has one."""
        for found in self.gather(error):
            if found is not None:
                raise UserError(found)

"""The ranks that handle checkpoints together, and how they reach one decision."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from moetrain.errors import UserError
from moetrain.parallel.distributed import new_gloo_group
from moetrain.parallel.watchdog.flight_recorder import patiently
from moetrain.parallel.watchdog.peer_errors import raising_peer_lost

_TIMEOUT = timedelta(hours=1)  # a dead rank closes its connections and is noticed at once
T = TypeVar("T")


class Peers:
    """The ranks that save and load together, over their own gloo group. All of them must construct it.

    The group is not the training's, whose collectives may run at the same time and whose time-out is shorter
    than a large checkpoint may take. ``group`` None means all ranks; without a process group there is one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.world = 0, 1
        if not (dist.is_available() and dist.is_initialized()):
            return
        ranks = dist.get_process_group_ranks(group)
        self.group = new_gloo_group(_TIMEOUT, ranks)
        self.rank, self.world = dist.get_rank(self.group), len(ranks)

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values = cast(list[T], [None] * self.world)
        with raising_peer_lost("handling a checkpoint"):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Call ``make()`` on rank 0; every rank returns its result, or raises its UserError."""
        value, error = None, None
        if self.rank == 0:
            try:
                value = make()
            except UserError as failure:
                error = failure
        self.raise_together(error)
        return cast(T, self.gather(value)[0])

    def together(self, work: Callable[[], T]) -> T:
        """Call ``work()`` on every rank and return its result; a UserError of any rank is raised on all."""
        try:
            value, error = [work()], None
        except UserError as found:
            value, error = [], found
        self.raise_together(error)
        return value[0]

    def raise_together(self, error: UserError | str | None) -> None:
        """If any rank has an error, raise the first rank's on every rank; a text is raised as a UserError."""
        for found in self.gather(error):
            if found is not None:
                raise UserError(found) if isinstance(found, str) else found


def from_rank_0(make: Callable[[], T], name: str) -> T:
    """Call ``make()`` on rank 0; every rank returns its result, or raises its UserError.

    For use before :class:`Peers` exist. ``name``: for the watchdog's report. ``make`` may take long.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return make()
    found: list[T | UserError | None] = [None]
    with patiently(name), raising_peer_lost(name):
        if dist.get_rank() == 0:
            try:
                found = [make()]
            except UserError as error:
                found = [error]
        dist.broadcast_object_list(found, 0, device=torch.device("cpu"))
    if isinstance(found[0], UserError):
        raise found[0]
    return cast(T, found[0])

"""The collectives of dispatch, each told to an observer: a watchdog, or one that counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Collective:
    """One collective of one layer, as this rank is about to make it.

    layer     the layer's name in the model.
    name      what travels: ``counts``, ``rows``, ``weights``, ``results``, their gradients, ``rounds``.
    kind      all_to_all, all_reduce, all_gather or reduce_scatter.
    sent      rows to each rank of the group, received likewise; empty where all ranks have the same.
    row_bytes bytes of one row.
    """

    layer: str
    name: str
    kind: str
    group: dist.ProcessGroup
    sent: Sequence[int]
    received: Sequence[int]
    row_bytes: int


Observer = Callable[[Collective], AbstractContextManager[object]]


def unobserved(collective: Collective) -> AbstractContextManager[object]:
    return nullcontext()


@dataclass(frozen=True)
class Exchange:
    """The ranks of a layer's experts and the collectives among them; every one goes through here."""

    group: dist.ProcessGroup
    layer: str = ""
    observer: Observer = unobserved

    def over(self, group: dist.ProcessGroup) -> Exchange:
        """The same layer's collectives over other ranks."""
        return replace(self, group=group)

    def all_to_all(
        self, name: str, rows: Tensor, sent: Sequence[int] = (), received: Sequence[int] = ()
    ) -> Tensor:
        """Rows [sum(received), ...] from all ranks, in rank order; without splits every rank gets as many."""
        with self._observed(name, "all_to_all", rows, sent, received):
            out = rows.new_empty(sum(received) if received else rows.shape[0], *rows.shape[1:])
            dist.all_to_all_single(
                out,
                rows.contiguous(),
                list(received) if received else None,
                list(sent) if sent else None,
                group=self.group,
            )
        return out

    def largest(self, name: str, value: int, device: torch.device) -> int:
        """The most of any rank; a host synchronisation."""
        most = torch.tensor(value, device=device)
        with self._observed(name, "all_reduce", most):
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
            return int(most)

    def _observed(
        self, name: str, kind: str, rows: Tensor, sent: Sequence[int] = (), received: Sequence[int] = ()
    ) -> AbstractContextManager[object]:
        row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
        return self.observer(Collective(self.layer, name, kind, self.group, sent, received, row_bytes))

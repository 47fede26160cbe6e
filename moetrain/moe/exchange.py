"""The collectives of dispatch, each told to an observer: a watchdog, or one that counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

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


class OutOfStepError(RuntimeError):
    """Ranks of one exchange are in different layers or passes: their rows do not belong together."""


@dataclass
class Calls:
    """Numbers a model's dispatches on this rank, also the recomputed. ``layers`` are its layers' names."""

    layers: Sequence[str] = ()
    made: int = 0

    def next(self, layer: str) -> int:
        """A stamp that ranks in step agree on."""
        self.made += 1
        place = self.layers.index(layer) + 1 if layer in self.layers else 0
        return self.made * (len(self.layers) + 1) + place

    def describe(self, stamp: int) -> str:
        number, place = divmod(stamp, len(self.layers) + 1)
        return f"dispatch {number}" + (f" ({self.layers[place - 1]})" if place else "")


@dataclass(frozen=True)
class Exchange:
    """The ranks of a layer's experts and the collectives among them; every one goes through here.

    ``calls`` is shared by all layers of a model; ``layer`` is one of its.
    """

    group: dist.ProcessGroup
    layer: str = ""
    observer: Observer = unobserved
    calls: Calls = field(default_factory=Calls)

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

    def counts(self, sent_Pe: Tensor) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        """Rows of each rank for our experts [P, e], and (sent, received) on the host: one synchronisation.

        One number more travels with the counts, by which ranks out of step are found before their rows are
        mixed up. Raises OutOfStepError.
        """
        stamp = self.calls.next(self.layer)
        stamped_Pf = torch.nn.functional.pad(sent_Pe, (0, 1), value=stamp)
        row_bytes = sent_Pe.shape[1] * sent_Pe.element_size()
        with self.observer(Collective(self.layer, "counts", "all_to_all", self.group, (), (), row_bytes)):
            received_Pf = torch.empty_like(stamped_Pf)
            dist.all_to_all_single(received_Pf, stamped_Pf, group=self.group)
            sent, received = self.on_host(stamped_Pf, received_Pf)
        for rank, (ours, theirs) in enumerate(zip(sent, received, strict=True)):
            if (other := theirs.pop()) != ours.pop():
                here, there = (dist.get_global_rank(self.group, r) for r in (self.group.rank(), rank))
                raise OutOfStepError(
                    f"ranks out of step: rank {here} is in {self.calls.describe(stamp)}, "
                    f"rank {there} in {self.calls.describe(other)}"
                )
        return received_Pf[:, :-1], sent, received

    def on_host(self, *counts_Pf: Tensor) -> list[list[list[int]]]:
        """As lists: the host synchronisation of a dispatch."""
        read: list[list[list[int]]] = torch.stack(counts_Pf).tolist()
        return read

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

"""The collectives of dispatch, each told to an observer: a watchdog, or one that counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moetrain.compat import all_gather_single, reduce_scatter_single


@dataclass(frozen=True)
class Collective:
    """One collective of one layer, as this rank is about to make it.

    layer     the layer's name in the model.
    name      what travels: ``counts``, ``rows``, ``weights``, ``results``, their gradients, ``rounds``.
    kind      all_to_all, all_reduce, all_gather or reduce_scatter; ``host`` where this rank waits for numbers
              of the device and nothing is sent.
    sent      rows to each rank of the group, received likewise; empty where all have one, and for
              all_reduce and host.
    row_bytes bytes of one row.
    """

    layer: str
    name: str
    kind: str
    group: dist.ProcessGroup
    sent: Sequence[int]
    received: Sequence[int]
    row_bytes: int


# Called as a collective is made; its context is held while this rank waits for the outcome.
Observer = Callable[[Collective], AbstractContextManager[object]]


def unobserved(collective: Collective) -> AbstractContextManager[object]:
    return nullcontext()


class OutOfStepError(RuntimeError):
    """Ranks of one exchange are in different layers or passes: their rows do not belong together."""


@dataclass
class Calls:
    """Counts the dispatches that this rank makes, recomputed ones included. ``layers``: the layers' names."""

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
class PendingCollective:
    """A collective that was started; ``given`` is what it reads from meanwhile."""

    given: Tensor
    rows: Tensor
    work: dist.Work
    watched: AbstractContextManager[object]

    def wait(self) -> Tensor:
        """The rows that arrived; once only."""
        with self.watched:
            self.work.wait()
        return self.rows


@dataclass(frozen=True)
class Exchange:
    """The ranks of a layer's experts and the collectives among them; every one goes through here.

    Those named ``start_`` return at once. All ranks must make the same ones in the same order. ``calls`` is
    shared by all layers of a model; ``layer`` is one of its.
    """

    group: dist.ProcessGroup
    layer: str = ""
    observer: Observer = unobserved
    calls: Calls = field(default_factory=Calls)

    def over(self, group: dist.ProcessGroup) -> Exchange:
        """The same layer's collectives over other ranks."""
        return replace(self, group=group)

    @property
    def size(self) -> int:
        return self.group.size()

    def start_all_to_all(
        self, name: str, rows: Tensor, sent: Sequence[int] = (), received: Sequence[int] = ()
    ) -> PendingCollective:
        """Rows [sum(received), ...] from all ranks, in rank order; without splits every rank gets one."""
        rows = rows.contiguous()
        watched = self._observed(name, "all_to_all", rows, sent, received)
        out = rows.new_empty(sum(received) if sent else rows.shape[0], *rows.shape[1:])
        work = dist.all_to_all_single(
            out, rows, list(received) or None, list(sent) or None, group=self.group, async_op=True
        )
        return PendingCollective(rows, out, work, watched)

    def all_to_all(
        self, name: str, rows: Tensor, sent: Sequence[int] = (), received: Sequence[int] = ()
    ) -> Tensor:
        return self.start_all_to_all(name, rows, sent, received).wait()

    def start_all_gather(self, name: str, rows: Tensor) -> PendingCollective:
        """The rows [size n, ...] of all ranks, in rank order; every rank has n."""
        rows = rows.contiguous()
        each = [rows.shape[0]] * self.size
        watched = self._observed(name, "all_gather", rows, each, each)
        out = rows.new_empty(sum(each), *rows.shape[1:])
        return PendingCollective(
            rows, out, all_gather_single(out, rows, group=self.group, async_op=True), watched
        )

    def start_reduce_scatter(self, name: str, rows: Tensor) -> PendingCollective:
        """This rank's n rows of [size n, ...], summed over all ranks."""
        rows = rows.contiguous()
        each = [rows.shape[0] // self.size] * self.size
        watched = self._observed(name, "reduce_scatter", rows, each, each)
        out = rows.new_empty(each[0], *rows.shape[1:])
        work = reduce_scatter_single(out, rows, group=self.group, async_op=True)
        return PendingCollective(rows, out, work, watched)

    def largest(self, name: str, value: int, device: torch.device) -> int:
        """The most of any rank; a host synchronisation."""
        most = torch.full((), value, device=device)
        with self._observed(name, "all_reduce", most):
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        return int(self.read(name, most)[0])

    def counts(self, sent_Pf: Tensor) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        """What each rank has for us, of ``sent_Pf``'s shape, and (sent, received) on the host.

        One host synchronisation. A stamp travels with the counts, by which ranks out of step are found before
        their rows are mixed up. Raises OutOfStepError.
        """
        stamp = self.calls.next(self.layer)
        stamped_Pg = F.pad(sent_Pf, (0, 1), value=stamp)
        received_Pg = self.all_to_all("counts", stamped_Pg)
        sent, received = self.on_host("counts", stamped_Pg, received_Pg)
        self.check(sent[0][-1], [row[-1] for row in received])
        return received_Pg[:, :-1], [row[:-1] for row in sent], [row[:-1] for row in received]

    def on_host(self, name: str, *tables: Tensor) -> list[list[list[int]]]:
        """:meth:`read` of matrices, as lists."""
        return [table.tolist() for table in self.read(name, *tables)]

    def check(self, stamp: int, theirs: list[int]) -> None:
        """Raise OutOfStepError unless the stamps of all ranks, in rank order, are this one's."""
        for rank, other in enumerate(theirs):
            if other != stamp:
                here, there = (dist.get_global_rank(self.group, r) for r in (self.group.rank(), rank))
                raise OutOfStepError(
                    f"ranks out of step: rank {here} is in {self.calls.describe(stamp)}, "
                    f"rank {there} in {self.calls.describe(other)}"
                )

    def read(self, name: str, *tensors: Tensor) -> list[Tensor]:
        """int64 tensors of one device on the host, of their shapes, in one host synchronisation."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._observed(name, "host", flat):
            flat = flat.cpu()
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def _observed(
        self, name: str, kind: str, rows: Tensor, sent: Sequence[int] = (), received: Sequence[int] = ()
    ) -> AbstractContextManager[object]:
        row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
        return self.observer(Collective(self.layer, name, kind, self.group, sent, received, row_bytes))


@dataclass(frozen=True)
class SplitSizes:
    """How many rows go to and come from each rank of ``exchange``; results return in the same numbers."""

    exchange: Exchange
    sent: list[int]
    received: list[int]

    def out(self, name: str, rows: Tensor) -> PendingCollective:
        """``sum(sent)`` rows, by receiver; those that arrive are by sender."""
        return self.exchange.start_all_to_all(name, rows, self.sent, self.received)

    def back(self, name: str, rows: Tensor) -> PendingCollective:
        return self.exchange.start_all_to_all(name, rows, self.received, self.sent)

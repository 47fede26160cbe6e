"""The collectives of dispatch, each reported to an observer such as the watchdog or a test's counter."""

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
    """One collective of one layer, reported just before this rank starts it.

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
    """The ranks of one exchange are in different layers or passes, so their rows must not be combined."""


@dataclass
class Calls:
    """Counts this rank's dispatches, recomputed ones included. ``layers``: the names of the MoE layers."""

    layers: Sequence[str] = ()
    made: int = 0

    def next(self, layer: str) -> int:
        """The stamp of the next dispatch: a number that ranks agree on if they are in the same dispatch."""
        self.made += 1
        place = self.layers.index(layer) + 1 if layer in self.layers else 0
        return self.made * (len(self.layers) + 1) + place

    def describe(self, stamp: int) -> str:
        number, place = divmod(stamp, len(self.layers) + 1)
        return f"dispatch {number}" + (f" ({self.layers[place - 1]})" if place else "")


@dataclass(frozen=True)
class PendingCollective:
    """A collective that was started. ``given`` is its input, kept until it has finished."""

    given: Tensor
    rows: Tensor
    work: dist.Work
    watched: AbstractContextManager[object]

    def wait(self) -> Tensor:
        """Wait, and return the rows that arrived. Call it once."""
        with self.watched:
            self.work.wait()
        return self.rows


@dataclass(frozen=True)
class Exchange:
    """The ranks of a layer's experts, and the collectives among them.

    Methods named ``start_`` return at once. All ranks must call the same methods in the same order.
    ``calls`` is shared by all layers of a model; ``layer`` is the name of this one.
    """

    group: dist.ProcessGroup
    layer: str = ""
    observer: Observer = unobserved
    calls: Calls = field(default_factory=Calls)

    def over(self, group: dist.ProcessGroup) -> Exchange:
        """An exchange of the same layer over other ranks."""
        return replace(self, group=group)

    @property
    def size(self) -> int:
        return self.group.size()

    def start_all_to_all(
        self, name: str, rows: Tensor, sent: Sequence[int] = (), received: Sequence[int] = ()
    ) -> PendingCollective:
        """Rows [sum(received), ...] of all ranks, in rank order. Without splits each rank gets one row."""
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
        """The largest ``value`` of any rank. The host waits once."""
        most = torch.full((), value, device=device)
        with self._observed(name, "all_reduce", most):
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        return int(self.read(name, most)[0])

    def counts(self, sent_Pf: Tensor) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        """Exchange ``sent_Pf``: (the received counts [P, f], the sent and the received ones on the host).

        The host waits once. A stamp is sent along with the counts. Raises OutOfStepError if the stamps of
        the ranks differ, before any rows are mixed up.
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
    """The rows sent to and received from each rank of ``exchange``. Results return in the same numbers."""

    exchange: Exchange
    sent: list[int]
    received: list[int]

    def out(self, name: str, rows: Tensor) -> PendingCollective:
        """Start to send ``sum(sent)`` rows, sorted by receiver. The rows that arrive are sorted by sender."""
        return self.exchange.start_all_to_all(name, rows, self.sent, self.received)

    def back(self, name: str, rows: Tensor) -> PendingCollective:
        return self.exchange.start_all_to_all(name, rows, self.received, self.sent)

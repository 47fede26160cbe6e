"""Where this rank is: the main thread notes every collective as it enters and leaves it, for the watchdog.

A note is a few attribute assignments: no system call, no host synchronisation. Without a watchdog nothing is
noted at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from moetrain.moe.dispatch.collectives import Collective
from moetrain.parallel.watchdog.rank_status import Place, Position


class Clock:
    """Seconds that this process has run: those while it was stopped (Ctrl-Z, a debugger) are left out."""

    def __init__(self, longest: float) -> None:
        self.now = 0.0
        self._longest, self._last = longest, time.monotonic()

    def tick(self) -> None:
        """To be called several times in ``longest`` seconds: no more passes from one to the next."""
        now = time.monotonic()
        self.now += min(now - self._last, self._longest)
        self._last = now


class Journal:
    """What this rank has entered so far. Written by one thread, read by the watchdog's."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.phase = "starting"
        self.current: Entry | None = None
        self.last: Entry | None = None  # the one left most recently
        self.failed: Entry | None = None  # the first that an error went through
        self.on_failure: Callable[[RuntimeError], None] = lambda error: None  # called where it happens
        self.idle_since = clock.now
        self.counts: dict[str, int] = {}  # name of a group -> collectives entered
        self._groups: dict[str, dist.ProcessGroup] = {}

    def count(self, group: dist.ProcessGroup) -> int:
        name = group.group_name
        number = self.counts.get(name, 0) + 1
        if number == 1:
            self._groups[name] = group
        self.counts[name] = number
        return number

    def position(self, entry: Entry | None) -> Position:
        """In ``entry``, one of this journal's; may be asked by another thread than the one that notes."""
        place = None if entry is None else entry.place()
        since = self.idle_since if entry is None else entry.since
        last = self.last.place().title if self.last else ""
        phase = self.phase if entry is None else entry.phase
        counts = {key(self._groups[name]): number for name, number in list(self.counts.items())}
        return Position(phase, place, max(0.0, self.clock.now - since), last, counts)


class Entry:
    """One collective, entered and left by ``with``; inside one another the innermost counts."""

    __slots__ = ("_journal", "_outer", "backward", "collective", "number", "patient", "phase", "since")

    def __init__(self, journal: Journal, collective: Collective, patient: bool = False) -> None:
        self._journal, self.collective, self.patient = journal, collective, patient

    def __enter__(self) -> Entry:
        journal = self._journal
        self.number = journal.count(self.collective.group)
        self.phase, self.since = journal.phase, journal.clock.now
        self.backward = torch._C._current_graph_task_id() >= 0
        self._outer = journal.current
        journal.current = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        journal = self._journal
        journal.last, journal.idle_since = self, journal.clock.now
        journal.current = self._outer
        if isinstance(error, RuntimeError) and journal.failed is None:
            journal.failed = self
            if not self.patient:
                journal.on_failure(error)

    def place(self) -> Place:
        c = self.collective
        return Place(
            c.layer,
            c.name,
            c.kind,
            self.backward,
            key(c.group),
            self.number,
            self.patient,
            list(c.sent),
            list(c.received),
            c.row_bytes,
        )


def members(group: dist.ProcessGroup) -> list[int]:
    """The ranks of ``group`` in its order."""
    return dist.get_process_group_ranks(group)


def key(group: dist.ProcessGroup) -> str:
    """The same for all of its ranks and no other group's: those of one name share no rank."""
    return f"{group.group_name}/{members(group)[0]}"


_journal: Journal | None = None  # a process has one, as it has one default process group


def keep(journal: Journal | None) -> None:
    """Note in ``journal`` from now on; None: nowhere."""
    global _journal
    _journal = journal


def observe(collective: Collective) -> AbstractContextManager[object]:
    """An :data:`moetrain.moe.dispatch.collectives.Observer` that notes."""
    return nullcontext() if _journal is None else Entry(_journal, collective)


def watched(
    name: str, kind: str = "all_reduce", group: dist.ProcessGroup | None = None, layer: str = ""
) -> AbstractContextManager[object]:
    """Around a collective of ``group`` (None: all ranks) that is no layer's dispatch; says ``name`` of it."""
    if _journal is None:
        return nullcontext()
    group = dist.group.WORLD if group is None else group
    assert group is not None
    return Entry(_journal, Collective(layer, name, kind, group, (), (), 0))


def patiently(name: str) -> AbstractContextManager[object]:
    """Around what all ranks do together and one may be busy with for long: only silence ends such a wait."""
    group = dist.group.WORLD
    if _journal is None or group is None:
        return nullcontext()
    return Entry(_journal, Collective("", name, "", group, (), (), 0), patient=True)


def at(phase: str) -> None:
    """Say what the collectives from here on belong to: ``step 8``, ``evaluation after step 8``."""
    if _journal is not None:
        _journal.phase = phase

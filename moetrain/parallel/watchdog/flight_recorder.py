"""The flight recorder: the main thread records every collective that it enters and leaves, for the watchdog.

A record is a few attribute assignments: no system call, no host synchronisation. Without a watchdog nothing
is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist

from moetrain.moe.dispatch.collectives import Collective
from moetrain.parallel.watchdog.rank_status import Place, RankStatus


class Clock:
    """Seconds that this process has run, without those in which it was stopped (Ctrl-Z, a debugger).

    ``longest``: the most seconds that pass from one :meth:`tick` to the next.
    """

    def __init__(self, longest: float) -> None:
        self.now = 0.0
        self._longest, self._last = longest, time.monotonic()

    def tick(self) -> None:
        """Advance ``now``. Call it several times in ``longest`` seconds."""
        now = time.monotonic()
        self.now += min(now - self._last, self._longest)
        self._last = now


class FlightRecorder:
    """The collectives that this rank has entered; one thread writes it, the watchdog's reads it."""

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
        """Count one more collective of ``group``; returns its number, from 1."""
        name = group.group_name
        number = self.counts.get(name, 0) + 1
        if number == 1:
            self._groups[name] = group
        self.counts[name] = number
        return number

    def status(self, entry: Entry | None) -> RankStatus:
        """The status of this rank in ``entry``; None: in no collective. Any thread may call it."""
        place = None if entry is None else entry.place()
        since = self.idle_since if entry is None else entry.since
        last = self.last.place().title if self.last else ""
        phase = self.phase if entry is None else entry.phase
        counts = {key(self._groups[name]): number for name, number in list(self.counts.items())}
        return RankStatus(phase, place, max(0.0, self.clock.now - since), last, counts)


class Entry:
    """One collective, entered and left by ``with``. Of nested entries the innermost is the current one."""

    __slots__ = ("_outer", "_recorder", "backward", "collective", "number", "patient", "phase", "since")

    def __init__(self, recorder: FlightRecorder, collective: Collective, patient: bool = False) -> None:
        self._recorder, self.collective, self.patient = recorder, collective, patient

    def __enter__(self) -> Entry:
        recorder = self._recorder
        self.number = recorder.count(self.collective.group)
        self.phase, self.since = recorder.phase, recorder.clock.now
        self.backward = torch._C._current_graph_task_id() >= 0
        self._outer = recorder.current
        recorder.current = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        recorder = self._recorder
        recorder.last, recorder.idle_since = self, recorder.clock.now
        recorder.current = self._outer
        if isinstance(error, RuntimeError) and recorder.failed is None:
            recorder.failed = self
            if not self.patient:
                recorder.on_failure(error)

    def place(self) -> Place:
        """The collective as the other ranks get it."""
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
    """A string that all ranks of ``group`` agree on, and that differs from every other group's.

    Groups of one name share no rank, so the name and the first rank identify a group.
    """
    return f"{group.group_name}/{members(group)[0]}"


_recorder: FlightRecorder | None = None  # a process has one, as it has one default process group


def keep(recorder: FlightRecorder | None) -> None:
    """Record in ``recorder`` from now on; None: record nothing."""
    global _recorder
    _recorder = recorder


def observe(collective: Collective) -> AbstractContextManager[object]:
    """An :data:`moetrain.moe.dispatch.collectives.Observer` that records the collective."""
    return nullcontext() if _recorder is None else Entry(_recorder, collective)


def watched(
    name: str, kind: str = "all_reduce", group: dist.ProcessGroup | None = None, layer: str = ""
) -> AbstractContextManager[object]:
    """A context for a collective of the trainer, which records it as ``name``. ``group``: None: all ranks."""
    if _recorder is None:
        return nullcontext()
    group = dist.group.WORLD if group is None else group
    assert group is not None
    return Entry(_recorder, Collective(layer, name, kind, group, (), (), 0))


def patiently(name: str) -> AbstractContextManager[object]:
    """A context for long work of one rank while the others wait: the run ends only if heartbeats stop."""
    group = dist.group.WORLD
    if _recorder is None or group is None:
        return _alone(name)
    return Entry(_recorder, Collective("", name, "", group, (), (), 0), patient=True)


def at(phase: str) -> None:
    """Set the phase of the collectives from here on, such as ``step 8`` or ``evaluation after step 8``."""
    global _phase
    _phase = phase, time.monotonic()
    if _recorder is not None:
        _recorder.phase = phase


def where() -> RankStatus:
    """What this rank does, with a watchdog or without one; any thread may call it."""
    if _recorder is not None:
        return _recorder.status(_recorder.current)
    phase, since = _phase
    return RankStatus(phase, None, time.monotonic() - since, "", {})


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Of a process without a watchdog: its long work is part of the phase meanwhile."""
    before = _phase[0]
    at(f"{before}, {name}")
    try:
        yield
    finally:
        at(before)


_phase = "starting", time.monotonic()  # and since when

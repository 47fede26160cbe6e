"""The heartbeat: a thread that writes this rank's status to the run's store and reads the other ranks'.

It has its own connections to the store and uses no collective. Nobody waits for it when it is slow or stuck:
readers get what it has found so far.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from moetrain.parallel.watchdog.diagnosis import Peer
from moetrain.parallel.watchdog.flight_recorder import Clock
from moetrain.parallel.watchdog.rank_status import RankStatus

_READ_AT_ONCE = 64  # with more ranks than that, the others' statuses are read more rarely


class Heartbeat:
    """Writes and reads once every ``interval`` seconds from :meth:`start` to :meth:`stop`.

    ``connect(seconds)`` opens a client whose requests take at most that long, and raises
    ConnectionRefusedError if nothing listens. Each beat calls ``status`` for this rank's.
    """

    def __init__(
        self,
        connect: Callable[[float], Store],
        rank: int,
        world: int,
        interval: float,
        clock: Clock,
        status: Callable[[], RankStatus],
    ) -> None:
        self.ended: str | None = None  # what the first rank that ended the run said, with its number
        self._connect, self._rank, self._world = connect, rank, world
        self._interval, self._clock, self._status = interval, clock, status
        self._answered = clock.now
        self._refused: float | None = None  # since when the store's address refuses connections
        self._heard: dict[int, tuple[bytes, float]] = {}  # rank -> its last beat, and when it came
        self._end = ""
        self._wake, self._stopping, self._done = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._started = self._clock.now
        self._thread.start()

    def announce_end(self, why: str, seconds: float) -> None:
        """Ask all ranks to end; returns when the store has the reason, at the latest after ``seconds``."""
        self._end = why
        self._wake.set()
        self._done.wait(seconds)

    def stop(self, seconds: float) -> None:
        """Write one last status, then end the thread; waits ``seconds`` for it at most."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(seconds)

    def unreachable(self) -> float:
        """Seconds since the store last answered."""
        return self._clock.now - self._answered

    def refused(self) -> float:
        """Seconds since nothing listens at the store's address; 0 while something may."""
        return 0.0 if self._refused is None else self._clock.now - self._refused

    def peers(self) -> dict[int, Peer]:
        """Every other rank, with its last status and the age of that in seconds."""
        now, found = self._clock.now, {}
        for rank in range(self._world):
            if rank == self._rank:
                continue
            beat, when = self._heard.get(rank, (b"", self._started))
            status = RankStatus.from_json(beat.partition(b" ")[2]) if beat else None
            found[rank] = Peer(status, now - when)
        return found

    def _run(self) -> None:
        store: Store | None = None
        beats = 0
        while True:
            last = self._stopping.is_set()
            self._wake.clear()
            try:
                store = store or self._connect(max(5.0, 2 * self._interval))
                self._beat(store, beats)
            except ConnectionRefusedError:
                self._refused = self._clock.now if self._refused is None else self._refused
            except (dist.DistError, RuntimeError, OSError):
                store = None  # an answer that comes late would be taken for the next request's
                self._refused = None
            beats += 1
            if last:
                return
            self._wake.wait(self._interval)

    def _beat(self, store: Store, beats: int) -> None:
        store.set(str(self._rank), f"{beats} {self._status().to_json()}")
        if self._end:
            # The first one's reason stays: a later one may be its consequence.
            store.compare_set("end", "", f"rank {self._rank}: {self._end}")
            self._done.set()
        if store.check(["end"]):
            self.ended = store.get("end").decode()
        if beats % (1 + self._world // _READ_AT_ONCE) == 0 or self._end:
            self._read(store)
        self._answered, self._refused = self._clock.now, None

    def _read(self, store: Store) -> None:
        others = [rank for rank in range(self._world) if rank != self._rank]
        missing = [rank for rank in others if rank not in self._heard]
        if missing:  # asking for a key that is not there would wait for it
            others = [rank for rank in others if rank not in missing or store.check([str(rank)])]
        if not others:
            return
        for rank, beat in zip(others, store.multi_get([str(rank) for rank in others]), strict=True):
            if beat != self._heard.get(rank, (b"", 0.0))[0]:
                self._heard[rank] = (beat, self._clock.now)

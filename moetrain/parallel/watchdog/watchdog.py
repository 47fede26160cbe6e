"""The watchdog: a thread on each rank that ends the process with a report when the run cannot go on.

The flight recorder (flight_recorder.py) holds the collectives that the main thread enters and leaves. The
heartbeat (heartbeat.py) exchanges statuses (rank_status.py) through the run's store. The diagnosis
(diagnosis.py) decides when the run must end, and makes the report.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NoReturn

from torch.distributed.distributed_c10d import PrefixStore, Store

from moetrain.errors import write_error_file
from moetrain.moe.dispatch.collectives import OutOfStepError
from moetrain.parallel.distributed import agent_serves, rank, run_store, start_prefix, world
from moetrain.parallel.watchdog.diagnosis import View, diagnose, report
from moetrain.parallel.watchdog.flight_recorder import Clock, Entry, FlightRecorder, keep, members
from moetrain.parallel.watchdog.heartbeat import Heartbeat
from moetrain.parallel.watchdog.peer_errors import cause, peer_lost
from moetrain.parallel.watchdog.rank_status import ALL_DONE, RankStatus
from moetrain.terminal import printable

_BEAT = 1.0  # seconds, or an eighth of a shorter time-out
_OVERDUE = 4  # beats without a new status of a rank
_LEAVING = 2.0  # seconds that a last message to the store may take
_ADVICE = "nothing was saved; resume=auto goes on from the last checkpoint"
_dogs = 0  # made by this process: all ranks make as many, and each has its keys in the store


def backend_timeout(seconds: float) -> float:
    """The back-end's own time-out for a watchdog of ``seconds``: always later, and enough to start a run."""
    return 2 * seconds + 60


@contextlib.contextmanager
def watching(seconds: float) -> Iterator[None]:
    """End this process with a report if a collective takes longer than ``seconds``, or fails.

    Does nothing on one rank, or inside another ``watching``. Exceptions that no other rank caused propagate.
    """
    global _dogs
    if world() == 1 or _dog is not None:
        yield
        return
    dog = Watchdog(seconds, f"{start_prefix()}/watchdog/{_dogs}")
    _dogs += 1
    with dog:
        yield


def end_run(why: str) -> NoReturn:
    """End this process, and with it all ranks, because of ``why``; from any thread."""
    if _dog is not None:
        _dog.end(why)
    with contextlib.suppress(OSError):
        os.write(2, f"moetrain: error: {why}\n".encode())
    write_error_file(why)
    os._exit(1)


class Watchdog:
    """Watches while its ``with`` block runs. ``seconds``: the time-out of a collective. ``prefix``: that of
    the watchdog's keys in the store, the same on all ranks.
    """

    def __init__(self, seconds: float, prefix: str) -> None:
        self._seconds, self._prefix = seconds, prefix
        self._interval = min(_BEAT, seconds / 8)
        self._sure = _OVERDUE * self._interval
        self._clock = Clock(self._sure)
        self.recorder = FlightRecorder(self._clock)
        self.recorder.on_failure = self._broken
        self._ended = ""
        self._ending = threading.Lock()
        self._stop = threading.Event()
        self._heart = Heartbeat(self._connect, rank(), world(), self._interval, self._clock, self._status)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        global _dog
        keep(self.recorder)
        self._heart.start()
        self._thread.start()
        _dog = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        global _dog
        if isinstance(error, Exception) and (isinstance(error, OutOfStepError) or peer_lost(error)):
            self.end(cause(error), settle=True)
        self._ended = ALL_DONE if error is None else " ".join((str(error) or type(error).__name__).split())
        self._stop.set()
        if error is None and rank() == 0 and not agent_serves():
            self._pass(2 * self._interval)  # the store goes with this process: let the others read that first
        self._heart.stop(_LEAVING)
        self._thread.join()
        keep(None)
        _dog = None

    def _broken(self, error: RuntimeError) -> None:
        """A collective failed. The run ends right here: on the way out a signal could end it unreported."""
        self.end(cause(error), settle=True)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval / 2):
            self._clock.tick()
            if (ended := self._heart.ended) is not None:
                self.end(f"the run was ended by {ended}")
            if (why := diagnose(self._view(), self._seconds)) is not None:
                self.end(why)

    def _entry(self) -> Entry | None:
        return (self.recorder.failed if self._ended else None) or self.recorder.current

    def _status(self) -> RankStatus:
        return replace(self.recorder.status(self._entry()), ended=self._ended)

    def _view(self) -> View:
        entry = self._entry()
        group = [] if entry is None else members(entry.collective.group)
        own = self.recorder.status(entry)
        peers, heart = self._heart.peers(), self._heart
        host = None if agent_serves() else peers.get(0)
        done = host is not None and host.status is not None and host.status.ended == ALL_DONE
        unreachable, refused = (0.0, 0.0) if done else (heart.unreachable(), heart.refused())
        return View(rank(), own, peers, group, unreachable, self._sure, refused)

    def _connect(self, seconds: float) -> Store:
        """A client of the run's store. Raises OSError or DistError where it cannot be reached."""
        # The store's own client would try again where nothing listens, and not tell that from a slow answer.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address, seconds).close()
        return PrefixStore(self._prefix, run_store(seconds))

    def end(self, why: str, settle: bool = False) -> NoReturn:
        """Announce the end to the other ranks, print the report, and leave the process.

        If two threads call it, the second waits. ``settle``: first wait until silent ranks are overdue.
        """
        self._ending.acquire()
        self._ended = why
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when another rank has ended
        if settle:
            self._pass(self._sure + 2 * self._interval)  # a last beat may be read an interval late
        self._heart.announce_end(why, _LEAVING)
        lines = [*report(self._view(), why), _ADVICE]
        text = "".join(f"moetrain: error: rank {rank()}: {line}\n" for line in lines)
        with contextlib.suppress(OSError):
            os.write(2, printable(text).encode())
        write_error_file(f"rank {rank()}: {'; '.join(lines)}")
        self._pass(2 * self._interval)  # the store may go with this process: let the others read
        os._exit(1)

    def _pass(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(self._interval / 2)
            self._clock.tick()


_dog: Watchdog | None = None

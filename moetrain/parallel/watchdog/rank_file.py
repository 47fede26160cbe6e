"""The file in which a rank says what it does, for ``moetrain status``: see rank_record.py.

A thread of the rank writes it every few seconds, with no collective; nothing waits for it where a disk is
slow. The record has a fixed size and is written in place: a full disk does not stop it, a reader that meets a
writer finds the old beat or the new one (or looks again), and whoever opens the file on a network file system
finds the newest.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType

from moetrain.errors import UserError, listening
from moetrain.parallel.process import TEXT, boot_id
from moetrain.parallel.watchdog.flight_recorder import where
from moetrain.parallel.watchdog.rank_record import (
    DOING,
    FINISHED,
    SIZE,
    WRONG,
    RankRecord,
    fit,
    path_of,
    read_record,
)

_EVERY, _WRITES = 2.0, 64  # seconds between two beats; beats of all ranks in one of these
_LAST = 1.0  # seconds that a last beat may take
_ENDED_SILENTLY = "ended without a word (killed, or its machine went down)"


class RankFile:
    """Writes this rank's file from its ``with`` to the end of that, or of the process.

    ``speed`` is asked at each beat, and may be set. What the process ends with is in the last record,
    whichever thread ends it (:func:`moetrain.errors.listening`).
    """

    def __init__(self, run: Path, rank: int, world: int) -> None:
        self.speed: Callable[[], float | None] = lambda: None
        self._path = path_of(run, rank)
        now = time.time()
        every = max(_EVERY, _EVERY * world / _WRITES)
        here = (socket.gethostname()[:TEXT], boot_id(), os.getpid())
        self._record = RankRecord(rank, world, *here, now, now, every, "starting", 0.0)
        self._wake, self._written = threading.Event(), threading.Event()
        self._last = False
        self._thread = threading.Thread(target=self._run, name="rank-file", daemon=True)
        self._listening = listening(self._told)

    def __enter__(self) -> RankFile:
        with contextlib.suppress(OSError):  # whoever cannot write here is told by the run itself
            self._path.parent.mkdir(exist_ok=True)
            self._take_over()
            self._write(os.O_CREAT)
        self._thread.start()
        self._listening.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.__exit__(None, None, None)
        if error is not None and not self._record.ended:
            self._told(str(error) or type(error).__name__)
        self._end(self._record.ended or FINISHED)

    def stopped(self, why: str) -> None:
        """Say at the end that the run was asked to stop, which is nothing wrong."""
        self._record = replace(self._record, ended=fit(why, WRONG))

    def _take_over(self) -> None:
        """What went wrong last, of the record of an earlier start."""
        try:
            before = read_record(self._path)
        except UserError:
            return
        wrong, when = before.wrong, before.wrong_at
        if not before.ended:
            wrong = fit(f"{_ENDED_SILENTLY}; it was in: {before.doing}", WRONG)
            when = before.beat
        self._record = replace(self._record, wrong=wrong, wrong_at=when)

    def _told(self, line: str) -> None:
        """Called by the thread that ends the process, or before an error is raised."""
        if self._record.ended:
            return
        why = fit(line, WRONG)
        self._record = replace(self._record, wrong=why, wrong_at=time.time())
        self._end(why)

    def _end(self, why: str) -> None:
        self._record = replace(self._record, ended=why)
        self._last = True
        self._wake.set()
        self._written.wait(_LAST)

    def _run(self) -> None:
        while not self._written.is_set():
            self._wake.wait(self._record.every)
            last = self._last
            with contextlib.suppress(OSError):
                self._write()
            if last:
                self._written.set()

    def _write(self, flags: int = 0) -> None:
        """The record as it is now; only the first writing makes the file, which a failed start removes."""
        status, speed = where(), self.speed()
        doing = status.phase if status.place is None else f"{status.phase}, in {status.place.title}"
        record = replace(
            self._record, beat=time.time(), doing=fit(doing, DOING), seconds=status.seconds, speed=speed
        )
        text = json.dumps(asdict(record)).encode()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o644)
        try:
            os.pwrite(descriptor, text.ljust(SIZE - 1) + b"\n", 0)
        finally:
            os.close(descriptor)

"""Calls a tracker from a thread of its own, by a bounded queue: one that fails or hangs costs no step."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from moetrain.errors import UserError
from moetrain.train.log.loads import Loads
from moetrain.train.log.tracker import Tracker

_log = logging.getLogger(__name__)

WAITING = 1000  # calls that may wait; of some megabytes with the loads of a large model
START_SECONDS = 90.0
FINISH_SECONDS = 150.0  # how long the end of a run may wait for an upload


class Background:
    """A tracker whose methods return at once, :meth:`start` and :meth:`finish` after a bounded time.

    The first error after the start is a warning, and the tracker is not called again. While the queue is
    full, rows are dropped, counted, and that is said once; ``metrics.jsonl`` has them all. One that does
    not start is a UserError, but not where a run goes on after ``step`` steps: that trains without it.
    """

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        waiting: int = WAITING,
        start_seconds: float | None = None,
        finish_seconds: float | None = None,
    ) -> None:
        self._name, self._tracker = name, tracker
        self._start_seconds = START_SECONDS if start_seconds is None else start_seconds
        self._finish_seconds = FINISH_SECONDS if finish_seconds is None else finish_seconds
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._dead = threading.Event()
        self.dropped = 0

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        started: Future[None] = Future()

        def start() -> None:
            try:
                self._tracker.start(run_dir, config, step)
                started.set_result(None)
            except Exception as error:  # it is raised where it is waited for
                started.set_exception(error)

        self._calls.put(start)
        self._thread.start()
        done, _ = wait([started], self._start_seconds)
        why = started.exception() if done else self._too_slow()
        if why is None:
            return
        self._dead.set()
        if step == 0:
            raise why
        _log.warning("tracker=%s is off, and the run goes on without it: %s", self._name, why)

    def log(self, row: Mapping[str, Any], step: int, loads: Loads | None = None) -> None:
        self._later(lambda: self._tracker.log(row, step, loads), f"failed at step {step}")

    def alert(self, title: str, text: str, step: int) -> None:
        self._later(lambda: self._tracker.alert(title, text, step), f"failed at step {step}")

    def checkpoint(self, folder: Path, step: int) -> None:
        self._later(
            lambda: self._tracker.checkpoint(folder, step), f"failed at the checkpoint of step {step}"
        )

    def abandon(self) -> None:
        self._tracker.abandon()

    def finish(self, ok: bool) -> None:
        deadline = time.monotonic() + self._finish_seconds
        for call in (self._guarded(lambda: self._tracker.finish(ok), "failed to finish"), None):
            try:
                self._calls.put(call, timeout=max(0.0, deadline - time.monotonic()))
            except queue.Full:
                break
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._dead.set()  # what it still does when it wakes up is to end
            left = self._calls.qsize()
            _log.warning(
                "tracker=%s did not finish in %g s, and is left alone with %d calls waiting; metrics.jsonl "
                "has all rows", self._name, self._finish_seconds, left,
            )  # fmt: skip
            self._tracker.abandon()
        if self.dropped:
            _log.warning("tracker=%s: %d calls in all were dropped", self._name, self.dropped)

    def _later(self, action: Callable[[], None], what: str) -> None:
        if self._dead.is_set():
            return
        try:
            self._calls.put_nowait(self._guarded(action, what))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                _log.warning(
                    "tracker=%s takes no more: %d calls wait, and rows are dropped until it does; "
                    "metrics.jsonl has them all", self._name, self._calls.maxsize,
                )  # fmt: skip

    def _guarded(self, action: Callable[[], None], what: str) -> Callable[[], None]:
        def call() -> None:
            if self._dead.is_set():
                return
            try:
                action()
            except Exception as error:  # whatever a network client raises must not end the training
                self._dead.set()
                reason = f"{type(error).__name__}: {error}"
                _log.warning("tracker=%s %s and is off from here on (%s)", self._name, what, reason)

        return call

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    def _too_slow(self) -> UserError:
        return UserError(
            f"tracker={self._name} did not start in {self._start_seconds:g} s; check its service, or set "
            "tracker=jsonl"
        )

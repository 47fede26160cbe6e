"""Stopping between two steps: signals, the STOP file, and agreement of all ranks.

How a trainer tells the three ways of ending apart:

* :meth:`StopFlag.agree` returns True on every rank at the same step: save, say so, exit 75.
* a second signal: the process is gone (exit code 128 + its number), nothing is saved.
* :class:`PeerLostError`, raised by :meth:`StopFlag.agree` and by the checkpointer, or any exception for which
  :func:`peer_lost` is true: a rank is dead or unreachable. Call no collective and save
  nothing; print the message and leave with a non-zero code through ``os._exit``, since destroying the process
  group may wait for the dead rank. The newest checkpoint is untouched.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from moetrain.parallel.early_warning import early_warning
from moetrain.parallel.environment import grace_seconds as launchers_grace
from moetrain.parallel.watchdog.flight_recorder import watched
from moetrain.parallel.watchdog.peer_errors import PeerLostError, cause

STOP_FILE = "STOP"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last: a batch system's usual warning
log = logging.getLogger(__name__)


class StopFlag:
    """A request to stop, seen by :meth:`requested` on this rank and by :meth:`agree` on all of them.

    Used as a context manager: inside it SIGINT, SIGTERM and SIGUSR1 set the flag, and a second signal leaves
    at once even while the main thread waits in a collective (a small thread listens); outside it the earlier
    handlers are back. ``stop_file`` (rank 0 looks) is the same as a SIGTERM and is removed when it has been
    obeyed. ``group`` carries the agreement, None for the default one; it needs gloo or a CUDA device. Signals
    within ``grace_seconds`` of the first count as one, because launchers send them more than once; None: as
    long as this one does. Entered outside the main thread, only the STOP file works.
    """

    def __init__(
        self,
        stop_file: Path | None = None,
        group: dist.ProcessGroup | None = None,
        grace_seconds: float | None = None,
    ) -> None:
        if grace_seconds is None:
            grace_seconds = launchers_grace()
        distributed = dist.is_available() and dist.is_initialized()
        self.reason: str | None = early_warning()
        self._stop_file = stop_file
        self._group = group
        self._grace = grace_seconds
        self._rank = dist.get_rank(group) if distributed else 0
        self._world = dist.get_world_size(group) if distributed else 1
        self._device = _device_for(group) if self._world > 1 else torch.device("cpu")
        self._first: float | None = None
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StopFlag:
        global _active
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._thread = threading.Thread(
            target=self._listen, args=(self._pipe[0],), name="stop-flag", daemon=True
        )
        self._thread.start()
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        self._previous_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        _active = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is None or self._thread is None:
            return
        self._restore()
        os.close(self._pipe[1])  # the listener reads the end of the pipe and returns
        self._thread.join()
        os.close(self._pipe[0])
        self._pipe = self._thread = None

    def requested(self) -> bool:
        """Whether this rank has been asked to stop."""
        if self.reason is None and self._rank == 0 and self._stop_file is not None:
            with contextlib.suppress(OSError):
                if self._stop_file.exists():
                    self.reason = f"{self._stop_file} exists"
        return self.reason is not None

    def agree(self) -> bool:
        """Whether any rank has been asked to stop: the same answer on every rank. Once a step, on all ranks.

        One all-reduce of four bytes. Raises PeerLostError when it fails: see the module's text.
        """
        stop = self.requested()
        if self._world > 1:
            flag = torch.tensor([int(stop)], dtype=torch.int32, device=self._device)
            try:
                with watched("whether to stop", group=self._group):
                    dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
                    stop = bool(flag.item())
            except RuntimeError as error:
                raise PeerLostError(
                    f"rank {self._rank} of {self._world} lost contact with another rank ({cause(error)}); "
                    "nothing was saved, resume=auto goes on from the last checkpoint"
                ) from error
        if stop:
            self.reason = self.reason or "another rank was asked to stop"
            self._consume()
        return stop

    def _consume(self) -> None:
        if self._stop_file is None or self._rank != 0:
            return
        try:
            self._stop_file.unlink(missing_ok=True)
        except OSError as error:
            log.warning(
                "%s could not be removed (%s): remove it before resuming", self._stop_file, error.strerror
            )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # The listener counts the signals; this makes the request visible to the main thread without delay.
        self.reason = self.reason or signal.Signals(number).name

    def _listen(self, fd: int) -> None:
        while data := os.read(fd, 64):
            for number in data:
                if number in _SIGNALS:
                    self._count(number)

    def _count(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self._first is None:
            self._first = now
            self.reason = self.reason or name
            again = "; once more leaves at once without saving" if self._grace < math.inf else ""
            self._say(f"{name}: stopping after this step and saving{again}")
        elif now - self._first >= self._grace:
            self._say(f"{name} again: leaving at once, nothing more is saved")
            os._exit(128 + number)

    def _say(self, text: str) -> None:
        if self._rank == 0:
            with contextlib.suppress(OSError):
                os.write(2, f"moetrain: {text}\n".encode())

    def _restore(self) -> None:
        global _active
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _active = None


def _device_for(group: dist.ProcessGroup | None) -> torch.device:
    group = dist.group.WORLD if group is None else group
    cpu = torch.device("cpu")
    # get_backend() names one backend only, also for a group that has gloo for the CPU and nccl for CUDA.
    if group is None or cpu in group._device_types:
        return cpu
    return torch.device("cuda", torch.cuda.current_device())


_active: StopFlag | None = None
_forking = threading.local()


def _before_fork() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    """A forked worker must die of a signal and must not report its signals to its parent's listener."""
    if _active is not None:
        _active._restore()
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)

"""The end of a rank whose launcher is gone: it would otherwise go on and write beside the next start.

Imports no torch, so that a rank is watched from its first line on. A process without a launcher, such as one
under nohup, outlives its shell.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

from moetrain.errors import write_error_file

_POLL = 1.0  # seconds
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_watched = 0  # the process whose thread runs: a forked child has none


def launcher() -> int | None:
    """The id of the process that started this one as a rank; None if the environment names no launcher.

    Without torchrun's own variable, a process that ignores SIGHUP (nohup) is meant to outlive its parent.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return os.getppid()
    by_hand = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return os.getppid() if all(name in os.environ for name in _RANK_VARIABLES) and not by_hand else None


def end_with_launcher() -> None:
    """Start a thread, once a process, that ends this process a few seconds after its launcher ends."""
    global _watched
    parent = launcher()
    if parent is None or _watched == os.getpid():
        return
    _watched = os.getpid()
    threading.Thread(target=_watch, args=(parent,), name="launcher", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL)
    line = (
        f"rank {os.environ.get('RANK', '0')}: its launcher (process {parent}) is gone, so this rank ends; "
        "the same command goes on from the last checkpoint"
    )
    with contextlib.suppress(OSError):
        os.write(2, f"moetrain: error: {line}\n".encode())
    write_error_file(line)
    os._exit(1)

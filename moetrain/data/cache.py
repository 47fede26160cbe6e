"""How a folder of prepared data is made exactly once by any number of processes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.errors import UserError

log = logging.getLogger("moetrain.data")


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return ``folder``, made by ``build(temporary folder)`` and one rename if it is not there yet.

    Processes that ask for the same folder wait for the first one. The lock is the kernel's (flock): it
    goes when its holder dies, and what a dead holder left half-written is removed by the next one.
    A failed build leaves nothing behind. Raises UserError when the cache cannot be written.
    """
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock")):
            if not folder.exists():
                _build(folder, build)
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "free some space" if error.errno == errno.ENOSPC else "make it writable"
        raise UserError(f"cannot write {folder}: {reason}; {hint} or set data.cache_dir") from error
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir()
        build(temporary)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that is writing %s", path.with_suffix("").name)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back

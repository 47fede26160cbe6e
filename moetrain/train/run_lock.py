"""A run folder has one owner: a lock that goes with its process, and a record of who that is.

The lock is a POSIX record lock, which NFS servers keep for all their clients and which forked children do not
inherit. The record (:mod:`moetrain.train.run_owner`) says who holds it, and is trusted alone where the file
system has no locks. Where it may have them for one machine only, a beating record of another machine counts.

Closing any descriptor of the lock's file would give up the lock: nothing else opens it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from moetrain.checkpoint.peers import from_rank_0
from moetrain.errors import TrainingError, UserError
from moetrain.parallel.watchdog.rank_record import RANKS
from moetrain.parallel.watchdog.watchdog import end_run
from moetrain.train.run_dir import PLACES, cannot_be_used, missing, remove_empty
from moetrain.train.run_owner import (
    RECORD,
    Owner,
    read_owner,
    remove_owner,
    renew_owner,
    this_process,
    write_owner,
)

LOCK = ".lock"
BEAT = 3.0  # seconds between two beats of an owner
_WATCHED = 2.4 * BEAT  # seconds without a beat after which an owner counts as gone
_SETTLED = 1.0  # seconds after which two that took the folder at once see which of them has it
_ORPHAN = 15.0  # seconds that an owner without its launcher may take to end
_SOON = 5.0  # seconds in which who has just locked the folder has written its record
_POLL = 0.1
_TRIES = 100  # openings of a lock file that its owner removes at that moment
_REFUSED = {errno.EACCES, errno.EAGAIN}
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}

_held: set[str] = set()  # a process's own locks do not exclude one another
log = logging.getLogger(__name__)


class FolderInUseError(UserError):
    """Another process owns the run folder."""

    exit_code = 3


class FolderLostError(TrainingError):
    """The run folder was removed, or belongs to another process by now: nothing may be written."""


class FolderLock:
    """The ownership of ``folder`` from :meth:`acquire` to :meth:`release`, or to the end of the process.

    While it lasts a thread renews the record, and ends the run when the folder is gone or another's.
    ``made``: what this start has made already, ``folder`` and those above it.
    """

    def __init__(self, folder: Path, made: Sequence[Path] = ()) -> None:
        self.folder = Path(folder)
        self._made = list(made)
        self._key = os.path.realpath(folder)
        self._owner = this_process()
        self._descriptor = self._place = -1  # of the lock's file, once it is locked; of the folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-folder", daemon=True)

    def acquire(self) -> None:
        """Make the folder and own it. Raises FolderInUseError, and UserError where it cannot be used."""
        if self._key in _held:
            raise FolderInUseError(f"the run folder {self.folder} is in use by this process itself")
        try:
            self._made += missing(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._place = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._record(locked=self._lock())
        except OSError as error:
            self._leave()
            raise cannot_be_used(self.folder, error) from error
        except BaseException:
            self._leave()
            raise
        _held.add(self._key)
        self._thread.start()

    def check(self) -> None:
        """Raises FolderLostError where the folder is gone or another's, OSError where that is not seen."""
        if (why := self._lost()) is not None:
            raise FolderLostError(why)

    def release(self) -> None:
        """Leave the folder to others, without a trace of the lock; nothing to do where it is not held."""
        if not self._thread.is_alive():
            return
        self._stop.set()
        self._thread.join()
        self._leave()
        _held.discard(self._key)

    def give_back(self) -> None:
        """Leave the folder; remove it, and those above it, where this start made them and wrote nothing."""
        if self._made:
            with contextlib.suppress(OSError):  # of a folder that was never owned too
                if self._lost() is None and set(os.listdir(self.folder)) <= {LOCK, RECORD, RANKS, *PLACES}:
                    shutil.rmtree(self.folder / RANKS, ignore_errors=True)
                    remove_empty(self.folder / place for place in PLACES)
        self.release()
        remove_empty(self._made)

    def _lock(self) -> bool:
        """Take the kernel's lock; False where the file system has none."""
        until = time.monotonic() + _ORPHAN
        for _ in range(_TRIES):
            descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno not in _REFUSED:
                    why = error.strerror
                    log.warning("%s: no file locks (%s), its owner is in %s alone", self.folder, why, RECORD)
                    return False
                owner = self._who()
                if owner is None or not owner.orphaned() or time.monotonic() > until:
                    raise self._in_use(owner) from None
                time.sleep(_POLL)
                continue
            if _is_at(self.folder / LOCK, descriptor):
                self._descriptor = descriptor
                return True
            os.close(descriptor)  # its last owner removed it after it had been opened here
        raise UserError(f"the run folder {self.folder} cannot be locked: its {LOCK} does not stay")

    def _record(self, locked: bool) -> None:
        """Become the owner on record, where the one on record is gone."""
        before = read_owner(self.folder)
        trusted = locked and before is not None and before.here()
        if before is not None and not (trusted and (before.pid == os.getpid() or not before.runs_here())):
            before, trusted = self._watch(before), False
        if before is None:
            try:
                write_owner(self.folder, self._owner, new=True)
            except FileExistsError:
                raise self._in_use(self._who()) from None
            return
        write_owner(self.folder, self._owner, new=False)
        if trusted:  # by the kernel's word a process of this machine is gone
            return
        time.sleep(_SETTLED)
        after = read_owner(self.folder)
        if after is None or after.token != self._owner.token:
            raise self._in_use(after)
        log.warning("%s was used by %s, of which nothing is heard: taken over", self.folder, before)

    def _watch(self, before: Owner) -> Owner | None:
        """``before`` where it does not beat, None where it has left. Raises FolderInUseError if it lives."""
        until = time.monotonic() + _WATCHED
        while time.monotonic() < until:
            time.sleep(_POLL)
            now = read_owner(self.folder)
            if now != before:
                if now is None:
                    return None
                raise self._in_use(now)
        return before

    def _who(self) -> Owner | None:
        """Who has the lock: a record written a moment ago, perhaps over that of one who crashed."""
        until = time.monotonic() + _SOON
        while True:
            owner = read_owner(self.folder)
            if (owner is not None and (owner.runs_here() or not owner.here())) or time.monotonic() > until:
                return owner
            time.sleep(_POLL)

    def _in_use(self, owner: Owner | None) -> FolderInUseError:
        return FolderInUseError(
            f"the run folder {self.folder} is in use by {owner or 'another process'}: "
            "wait for it, stop it, or choose another run.name"
        )

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            self._owner = replace(self._owner, beat=self._owner.beat + 1)
            with contextlib.suppress(OSError):  # storage that does not answer: looked at again before a save
                if (why := self._lost()) is not None:
                    end_run(f"{why}; this run has ended and writes nothing more")
                renew_owner(self.folder, self._owner)

    def _lost(self) -> str | None:
        """Why the folder is not this process's any more. Raises OSError where that cannot be seen."""
        if not _is_at(self.folder, self._place):
            return f"the run folder {self.folder} was removed or replaced while it was in use"
        owner = read_owner(self.folder)
        if owner is None:
            return f"{self.folder / RECORD} was removed while the folder was in use"
        if owner.token != self._owner.token:
            return f"the run folder {self.folder} was taken by {owner}"
        return None

    def _leave(self) -> None:
        """Remove what is this process's own, the lock's file before it is unlocked."""
        with contextlib.suppress(OSError):
            remove_owner(self.folder, self._owner)
            if self._descriptor >= 0 and _is_at(self.folder / LOCK, self._descriptor):
                (self.folder / LOCK).unlink()
        for descriptor in (self._descriptor, self._place):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._place = -1


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether ``path`` is still what ``descriptor`` has open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError as error:
        if error.errno in _GONE:
            return False
        raise


@contextlib.contextmanager
def owning(folder: Path, made: Sequence[Path]) -> Iterator[FolderLock]:
    """Own a run folder, by rank 0 for all ranks; collective. Raises FolderInUseError on all of them.

    A start that fails before anything was written leaves no folder that it made, ``made`` included.
    """
    lock = FolderLock(folder, made)
    try:
        from_rank_0(lock.acquire, "taking the run folder")
        yield lock
    except BaseException:
        lock.give_back()
        raise
    lock.release()

"""Owners of a run folder: of this process, and of another machine; and locks that no test outlives."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from moetrain.train import run_lock
from moetrain.train.run_lock import FolderLock
from moetrain.train.run_owner import Owner, this_process, write_owner

OTHER_BOOT = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture
def quick(monkeypatch):
    """Beats and waits of a fraction of a second."""
    monkeypatch.setattr(run_lock, "BEAT", 0.1)
    monkeypatch.setattr(run_lock, "_WATCHED", 0.5)
    monkeypatch.setattr(run_lock, "_SETTLED", 0.1)
    monkeypatch.setattr(run_lock, "_SOON", 0.2)
    monkeypatch.setattr(run_lock, "_POLL", 0.02)


@pytest.fixture(autouse=True)
def ended(monkeypatch):
    """What the end of the run would say. No lock outlives its test: once lost it would end this process."""
    said: list[str] = []
    locks: list[FolderLock] = []
    acquire = FolderLock.acquire
    monkeypatch.setattr(run_lock, "end_run", said.append)
    monkeypatch.setattr(FolderLock, "acquire", lambda lock: (locks.append(lock), acquire(lock))[1])
    yield said
    for lock in locks:
        lock.release()


def held(folder: Path) -> FolderLock:
    lock = FolderLock(folder)
    lock.acquire()
    return lock


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def stranger(**fields: object) -> Owner:
    return replace(this_process(), host="node7", boot=OTHER_BOOT, pid=4711, job="99", **fields)


def take_away(folder: Path) -> None:
    write_owner(folder, stranger(since="now"), new=False)

"""A run folder has one owner: who holds it, who is refused, what a crash leaves, and how it is lost."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from moetrain.checkpoint import write as checkpoint_write
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.errors import UserError
from moetrain.train import run_lock, run_owner
from moetrain.train.run_lock import LOCK, FolderInUseError, FolderLock, FolderLostError
from moetrain.train.run_owner import RECORD, Owner, read_owner, this_process, write_owner

OTHER_BOOT = "01234567-89ab-cdef-0123-456789abcdef"


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[Any]:
    """Another process, which owns ``folder`` until it is killed."""
    context = multiprocessing.get_context("fork")
    said, says = context.Pipe(duplex=False)
    process = context.Process(target=_hold, args=(folder, says), daemon=True)
    process.start()
    try:
        assert said.recv() == "held"
        yield process
    finally:
        process.kill()
        process.join()


def _hold(folder: Path, says: Any) -> None:
    held(folder)
    says.send("held")
    time.sleep(600)


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


@pytest.fixture
def no_locks(monkeypatch, request):
    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.fixture
def local_locks(monkeypatch):
    """Locks that another machine's processes do not see: here, every lock is granted."""
    monkeypatch.setattr(fcntl, "lockf", lambda *_: None)
    monkeypatch.setattr(run_lock, "_held", set())


def held(folder: Path) -> FolderLock:
    lock = FolderLock(folder)
    lock.acquire()
    return lock


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def test_a_clean_end_leaves_no_trace(tmp_path):
    lock = held(tmp_path / "runs" / "a")
    assert sorted(tiny.files(tmp_path)) == [f"runs/a/{LOCK}", f"runs/a/{RECORD}"]
    owner = read_owner(tmp_path / "runs" / "a")
    assert (owner.pid, owner.boot) == (os.getpid(), run_owner._boot())
    lock.check()
    lock.release()
    assert tiny.files(tmp_path) == []
    held(tmp_path / "runs" / "a").release()


def test_the_same_process_twice(tmp_path):
    lock = held(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(FolderInUseError, match="in use by this process itself"):
        FolderLock(tmp_path / "link").acquire()
    lock.check()
    lock.release()


@pytest.mark.parametrize("how", ["lives", "killed"])
def test_another_process_of_this_machine(how, tmp_path, quick):
    run = tmp_path / "run"
    with holder(run) as process:
        if how == "lives":
            before = {name: (run / name).stat().st_mtime_ns for name in [LOCK, "."]}
            with pytest.raises(FolderInUseError) as error:
                FolderLock(run).acquire()
            assert error.value.exit_code == 3
            assert f"the run folder {run} is in use by process {process.pid} on " in str(error.value)
            assert str(error.value).endswith(": wait for it, stop it, or choose another run.name")
            assert {name: (run / name).stat().st_mtime_ns for name in before} == before
    lock = held(run)  # at once: the kernel has released the lock
    lock.check()
    lock.release()
    assert tiny.files(run) == []


def stranger(**fields: object) -> Owner:
    return replace(this_process(), host="node7", boot=OTHER_BOOT, pid=4711, job="99", **fields)


@pytest.mark.parametrize("beats", [True, False])
def test_a_record_of_another_machine(beats, tmp_path, quick, caplog):
    """The lock is granted, which says nothing where locks do not reach other machines."""
    owner = stranger(since="yesterday")
    write_owner(tmp_path, owner, new=True)
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(0.1):
            number += 1
            write_owner(tmp_path, replace(owner, beat=number), new=False)

    thread = threading.Thread(target=beat)
    if beats:
        thread.start()
    try:
        lock = FolderLock(tmp_path)
        if beats:
            with pytest.raises(FolderInUseError, match=r"process 4711 on node7 since yesterday \(job 99\)"):
                lock.acquire()
            assert not (tmp_path / LOCK).exists()
        else:
            lock.acquire()
            assert "process 4711 on node7" in caplog.text
            assert "taken over" in caplog.text
            lock.check()
            lock.release()
    finally:
        stop.set()
        if beats:
            thread.join()
    assert (tmp_path / RECORD).exists() is beats


def test_a_lock_file_removed_by_hand_frees_nothing(tmp_path, quick):
    """The owner of the record lives on this machine and beats, whatever the new lock file says."""
    run = tmp_path / "run"
    with holder(run) as process:
        (run / LOCK).unlink()
        with pytest.raises(FolderInUseError, match=f"process {process.pid} "):
            FolderLock(run).acquire()
        assert tiny.files(run) == [RECORD]


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 2000, b'{"host": 1}'])
def test_a_damaged_record_is_no_obstacle(content, tmp_path, quick):
    (tmp_path / RECORD).write_bytes(content)
    lock = held(tmp_path)
    lock.check()
    lock.release()
    assert tiny.files(tmp_path) == []


@pytest.mark.parametrize("no_locks", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], indirect=True)
def test_without_locks_the_record_decides(no_locks, tmp_path, quick, monkeypatch, caplog):
    lock = held(tmp_path)
    assert "no file locks" in caplog.text
    monkeypatch.setattr(run_lock, "_held", set())  # as another process
    with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on "):
        FolderLock(tmp_path).acquire()
    lock.check()
    lock.release()
    assert read_owner(tmp_path) is None
    write_owner(tmp_path, replace(this_process(), pid=2**22 + 1), new=True)  # a crashed one of this machine
    lock = held(tmp_path)
    lock.release()


@pytest.mark.parametrize("stale", [False, True], ids=["new", "stale"])
def test_many_at_once_where_all_are_granted(stale, tmp_path, quick, local_locks, monkeypatch):
    """As many machines whose locks do not see one another: one has it, the others are refused."""
    monkeypatch.setattr(run_lock, "_SETTLED", 0.5)
    if stale:
        write_owner(tmp_path, stranger(), new=True)
    locks = [FolderLock(tmp_path) for _ in range(5)]
    for number, lock in enumerate(locks):
        lock._owner = replace(lock._owner, host=f"node{number}", boot=f"{OTHER_BOOT[:-1]}{number}")
    won: list[FolderLock] = []
    refused: list[str] = []

    def start(lock: FolderLock) -> None:
        try:
            lock.acquire()
            won.append(lock)
        except FolderInUseError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 4), refused
    won[0].check()
    won[0].release()


def take_away(folder: Path) -> None:
    write_owner(folder, stranger(since="now"), new=False)


def remove(folder: Path) -> None:
    tiny_files = tiny.files(folder)
    for name in tiny_files:
        (folder / name).unlink()
    folder.rmdir()


def replace_folder(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    folder.mkdir()


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (take_away, r"the run folder .*run was taken by process 4711 on node7 since now \(job 99\)"),
        (remove, "the run folder .*run was removed or replaced while it was in use"),
        (replace_folder, "the run folder .*run was removed or replaced while it was in use"),
        (lambda folder: (folder / RECORD).unlink(), f"run/{RECORD} was removed while"),
    ],
    ids=["taken", "removed", "replaced", "record removed"],
)
def test_a_lost_folder_ends_the_run(loss, said, tmp_path, quick, ended):
    lock = held(tmp_path / "run")
    wait_for(lambda: read_owner(tmp_path / "run").beat > 1)
    loss(tmp_path / "run")
    with pytest.raises(FolderLostError, match=said):
        lock.check()
    wait_for(lambda: ended)
    assert ended[0].endswith("; this run has ended and writes nothing more")
    lock.release()
    if loss is take_away:  # the other's record is left alone
        assert read_owner(tmp_path / "run").pid == 4711


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("moment", ["before", "while it is written"])
def test_nothing_is_saved_in_anothers_folder(moment, async_save, tmp_path, ended, monkeypatch):
    lock = held(tmp_path)
    checkpointer = Checkpointer(tmp_path / "checkpoints", async_save=async_save, guard=lock.check)
    checkpointer.save(1, {"w": torch.zeros(3)}, {})
    checkpointer.wait()
    if moment == "before":
        take_away(tmp_path)
    else:  # after the last of its own files
        encode = checkpoint_write.encode_manifest
        monkeypatch.setattr(
            checkpoint_write, "encode_manifest", lambda manifest: (take_away(tmp_path), encode(manifest))[1]
        )
    theirs = tmp_path / "checkpoints" / ".tmp_step_00000002" / "theirs"
    if moment == "before":
        theirs.parent.mkdir()
        theirs.touch()

    def save() -> None:
        checkpointer.save(2, {"w": torch.ones(3)}, {})
        checkpointer.wait()

    with pytest.raises(FolderLostError, match="was taken by process 4711 on node7"):
        save()
    assert tiny.checkpoints(tmp_path) == [1]
    assert theirs.exists() is (moment == "before")
    lock.release()


def test_an_owner_whose_launcher_is_gone_is_waited_for(tmp_path, quick, monkeypatch):
    """Its parent is this process, and its record names another as its launcher: it is about to end."""
    monkeypatch.setattr(run_lock, "BEAT", 60)
    run = tmp_path / "run"
    with holder(run) as process:
        owner = read_owner(run)
        assert not owner.orphaned()
        write_owner(run, replace(owner, launcher=os.getpid() + 1), new=False)
        threading.Timer(0.5, process.kill).start()
        lock = held(run)
    lock.release()


def test_records_say_the_job_and_fit(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "é" * 1000)
    monkeypatch.setattr(run_owner.socket, "gethostname", lambda: "\x07" * 1000)
    write_owner(tmp_path, this_process(), new=True)
    found = read_owner(tmp_path)
    assert found is not None
    assert found.job == "é" * run_owner._TEXT
    assert (tmp_path / RECORD).stat().st_size == run_owner._SIZE
    assert json.loads((tmp_path / RECORD).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("blocked", ["run", "."])
def test_a_folder_that_cannot_be_used(blocked, tmp_path):
    root = tmp_path / "root"
    (root / blocked).parent.mkdir(parents=True, exist_ok=True)
    (root / blocked).write_text("mine")
    with pytest.raises(UserError, match=r"the run folder .*root/run cannot be used: "):
        FolderLock(root / "run").acquire()

"""A run folder has one owner: who holds it, who is refused, and what a crash leaves."""

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
from lock_cases import OTHER_BOOT, ended, held, quick, stranger, take_away

from moetrain.errors import UserError
from moetrain.parallel.process import TEXT, boot_id
from moetrain.train import run_lock, run_owner
from moetrain.train.run_dir import RunDir, new_folder
from moetrain.train.run_lock import LOCK, FolderInUseError, FolderLock, owning
from moetrain.train.run_owner import RECORD, read_owner, this_process, write_owner

__all__ = ["ended", "quick"]  # fixtures


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
def no_locks(monkeypatch, request):
    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.fixture
def local_locks(monkeypatch):
    """Locks that another machine's processes do not see: here, every lock is granted."""
    monkeypatch.setattr(fcntl, "lockf", lambda *_: None)
    monkeypatch.setattr(run_lock, "_held", set())


def test_a_clean_end_leaves_no_trace(tmp_path):
    lock = held(tmp_path / "runs" / "a")
    assert sorted(tiny.files(tmp_path)) == [f"runs/a/{LOCK}", f"runs/a/{RECORD}"]
    owner = read_owner(tmp_path / "runs" / "a")
    assert (owner.pid, owner.boot) == (os.getpid(), boot_id())
    lock.check()
    lock.release()
    assert tiny.files(tmp_path) == []
    held(tmp_path / "runs" / "a").release()


def begun(run: Path, *files: str) -> FolderLock:
    """What a start has made before it has anything to write, and then ``files``."""
    lock = held(run)
    RunDir(run)
    for name in files:
        (run / name).touch()
    return lock


def test_a_start_that_wrote_nothing_leaves_no_folder(tmp_path):
    begun(tmp_path / "runs" / "a").give_back()
    assert os.listdir(tmp_path) == []
    folder, made = new_folder(tmp_path / "runs")
    with pytest.raises(UserError, match="no text"), owning(folder, made):
        raise UserError("no text")
    assert os.listdir(tmp_path) == []


def test_a_start_removes_no_folder_but_its_own(tmp_path):
    for name in ("a/samples", "b"):
        (tmp_path / name).mkdir(parents=True)
    begun(tmp_path / "a").give_back()
    begun(tmp_path / "b" / "c").give_back()
    begun(tmp_path / "d" / "e", "config.yaml").give_back()
    begun(tmp_path / "d" / "f").give_back()
    with owning(tmp_path / "g", []):
        pass
    places = {"checkpoints", "samples"}
    assert set(os.listdir(tmp_path / "a")) == places
    assert os.listdir(tmp_path / "b") == []
    assert os.listdir(tmp_path / "d") == ["e"]
    assert set(os.listdir(tmp_path / "d" / "e")) == {*places, "config.yaml"}
    assert os.listdir(tmp_path / "g") == []


def test_a_folder_that_is_anothers_by_now_is_left_whole(tmp_path, ended):
    lock = begun(tmp_path / "run")
    take_away(tmp_path / "run")
    lock.give_back()
    assert set(os.listdir(tmp_path / "run")) == {"checkpoints", "samples", RECORD}


def test_one_who_is_refused_removes_nothing(tmp_path, monkeypatch):
    """The folder was missing when he looked, and somebody else's when he came to own it."""
    other = begun(tmp_path / "run")
    monkeypatch.setattr(run_lock, "_held", set())
    monkeypatch.setattr(run_lock, "missing", lambda folder: [folder])
    monkeypatch.setattr(FolderLock, "_lock", refused)
    with pytest.raises(FolderInUseError), owning(tmp_path / "run", []):
        pass
    assert {"checkpoints", "samples"} <= set(os.listdir(tmp_path / "run"))
    other.check()


def refused(lock: FolderLock) -> bool:
    raise FolderInUseError(f"{lock.folder} is in use")


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
    assert found.job == "é" * TEXT
    assert (tmp_path / RECORD).stat().st_size == run_owner._SIZE
    assert json.loads((tmp_path / RECORD).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("blocked", ["run", "."])
def test_a_folder_that_cannot_be_used(blocked, tmp_path):
    root = tmp_path / "root"
    (root / blocked).parent.mkdir(parents=True, exist_ok=True)
    (root / blocked).write_text("mine")
    with pytest.raises(UserError, match=r"the run folder .*root/run cannot be used: "):
        FolderLock(root / "run").acquire()

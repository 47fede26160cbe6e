"""A disk that takes its time: training goes on, and the previous checkpoint stays until the next is whole."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.manifest import verify

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WAIT = 20  # seconds


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((7, 11), float(value)), "v": torch.full((13,), float(value))}


def value_of(checkpointer: Checkpointer) -> float:
    target = tensors(0)
    path = checkpointer.latest_valid()
    assert path is not None
    checkpointer.load(path, target)
    return float(target["w"].mean())


class Disk:
    """One whose calls wait from the ``blocked_from``-th on: the making of a folder, then flushes of files."""

    def __init__(self) -> None:
        self.go_on, self.waits = threading.Event(), threading.Event()
        self.blocked_from: int | None = None
        self._calls = 0

    def block(self, call: int = 0) -> None:
        self.blocked_from, self._calls = call, 0

    def wait(self) -> None:
        if self.blocked_from is not None and self._calls >= self.blocked_from:
            self.waits.set()
            assert self.go_on.wait(WAIT)
        self._calls += 1


@pytest.fixture
def disk(monkeypatch):
    made, mkdir = Disk(), os.mkdir

    def slow_mkdir(*args, **options):
        made.wait()
        mkdir(*args, **options)

    monkeypatch.setattr(os, "mkdir", slow_mkdir)
    monkeypatch.setattr(os, "fsync", lambda descriptor: made.wait())
    yield made
    made.go_on.set()


@pytest.mark.parametrize("call", [0, 1, 4])  # the folder, the tensors, the manifest
def test_training_goes_on_while_a_save_waits_for_the_disk(call, disk, tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=1, async_save=True)
    checkpointer.save(1, tensors(1), {})
    checkpointer.wait()
    disk.block(call)
    state = tensors(2)
    checkpointer.save(2, state, {})  # returns, though nothing is on the disk
    state["w"].fill_(9)  # the next step moves the weights
    assert disk.waits.wait(WAIT)
    assert verify(tmp_path / "step_00000001") == []
    assert not (tmp_path / "step_00000002").exists()
    disk.go_on.set()
    checkpointer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
    assert call or value_of(checkpointer) == 2


def test_the_next_save_waits_for_a_slow_one(disk, tmp_path):
    """Never two at a time: saves slower than the steps between them slow the run, and lose nothing."""
    checkpointer = Checkpointer(tmp_path, keep_last=2, async_save=True)
    disk.block()
    checkpointer.save(1, tensors(1), {})
    assert disk.waits.wait(WAIT)
    second = threading.Thread(target=checkpointer.save, args=(2, tensors(2), {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    disk.go_on.set()
    second.join(WAIT)
    checkpointer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_a_process_that_dies_in_a_slow_save_loses_nothing(disk, tmp_path):
    Checkpointer(tmp_path, keep_last=1).save(1, tensors(1), {})
    pid = os.fork()
    if pid == 0:
        disk.block(2)  # after the two folders, the first file
        Checkpointer(tmp_path, keep_last=1, async_save=True).save(2, tensors(2), {})
        time.sleep(WAIT)
        os._exit(1)
    until = time.monotonic() + WAIT
    while not list(tmp_path.glob(".tmp_step_00000002/*")):
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert value_of(Checkpointer(tmp_path, keep_last=1)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]

"""A tracker that raises, hangs or is slow: what training notices of it, and what is said."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny

from moetrain.errors import UserError
from moetrain.train.log.background import Background
from moetrain.train.log.loads import Loads
from moetrain.train.log.tracker import NoTracker
from moetrain.train.log.trackers import TRACKERS


class Hanging(NoTracker):
    """Waits for ``woken`` in one of its methods."""

    def __init__(self, method: str) -> None:
        self.method, self.woken = method, threading.Event()
        self.steps: list[int] = []
        self.abandoned = False

    def _reached(self, method: str) -> None:
        if method == self.method:
            self.woken.wait(60)

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        self._reached("start")

    def log(self, row: Mapping[str, Any], step: int, loads: Loads | None = None) -> None:
        self._reached("log")
        self.steps.append(step)

    def finish(self, ok: bool) -> None:
        self._reached("finish")

    def abandon(self) -> None:
        self.abandoned = True
        self.woken.set()


@pytest.fixture
def hanging(request: pytest.FixtureRequest) -> Iterator[Hanging]:
    tracker = Hanging(request.param)
    yield tracker
    tracker.woken.set()


def background(tracker: NoTracker, waiting: int = 7, seconds: float = 0.2) -> Background:
    return Background("test", tracker, waiting, start_seconds=seconds, finish_seconds=seconds)


@pytest.mark.parametrize("hanging", ["log"], indirect=True)
def test_rows_that_a_hanging_tracker_cannot_take_are_counted(hanging, tmp_path, caplog):
    tracker = background(hanging)
    tracker.start(tmp_path, {})
    begun = time.monotonic()
    for step in range(1, 101):
        tracker.log({"step": step}, step)
        time.sleep(0.001 if step == 1 else 0)  # the first row is taken, and hangs
    assert time.monotonic() - begun < 5
    assert tracker.dropped in (92, 93)
    tracker.finish(True)
    assert time.monotonic() - begun < 10
    assert hanging.abandoned
    said = [line for line in caplog.messages if "tracker=test" in line]
    assert len(said) == 3
    assert "takes no more: 7 calls wait" in said[0]
    assert "did not finish in 0.2 s" in said[1]
    assert f"{tracker.dropped} calls in all were dropped" in said[2]


@pytest.mark.parametrize("hanging", ["finish"], indirect=True)
def test_the_end_of_a_run_waits_a_bounded_time(hanging, tmp_path, caplog):
    tracker = background(hanging)
    tracker.start(tmp_path, {})
    tracker.log({"step": 1}, 1)
    begun = time.monotonic()
    tracker.finish(True)
    assert time.monotonic() - begun < 5
    assert hanging.steps == [1]
    assert "did not finish in 0.2 s, and is left alone with 1 calls" in caplog.text


@pytest.mark.parametrize("hanging", ["start"], indirect=True)
def test_a_start_that_hangs_is_an_error_of_a_fresh_run_only(hanging, tmp_path, caplog):
    with pytest.raises(UserError, match=r"tracker=test did not start in 0.2 s"):
        background(hanging).start(tmp_path, {}, step=0)
    resumed = background(hanging)
    resumed.start(tmp_path, {}, step=3)
    resumed.log({"step": 4}, 4)
    assert "tracker=test is off, and the run goes on without it" in caplog.text
    hanging.woken.set()
    resumed.finish(True)
    assert hanging.steps == []


class NoStart(NoTracker):
    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        raise UserError("no network")


def test_a_start_that_fails_is_an_error_of_a_fresh_run_only(tmp_path, caplog):
    with pytest.raises(UserError, match="no network"):
        background(NoStart()).start(tmp_path, {}, step=0)
    tracker = background(NoStart())
    tracker.start(tmp_path, {}, step=3)
    tracker.finish(True)
    assert "goes on without it: no network" in caplog.text


def test_calls_arrive_in_order_and_none_is_lost(tmp_path):
    inside = Hanging("never")
    tracker = background(inside, waiting=1000, seconds=20)
    tracker.start(tmp_path, {})
    for step in range(1, 501):
        tracker.log({"step": step}, step)
    tracker.finish(True)
    assert inside.steps == list(range(1, 501))
    assert tracker.dropped == 0


@pytest.mark.usefixtures("training")
@pytest.mark.parametrize("hanging", ["log", "finish"], indirect=True)
def test_training_ends_as_without_a_tracker_that_hangs(hanging, corpus, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "tensorboard", lambda cfg: hanging)
    monkeypatch.setattr("moetrain.train.log.background.FINISH_SECONDS", 0.2)
    run = tmp_path / "run"
    assert tiny.train(corpus, run, *tiny.TRAINED, "tracker=tensorboard") == 0
    assert tiny.steps(run) == tiny.steps(trained)
    assert hanging.abandoned


_STOPPED = """
import os, signal, sys
from pathlib import Path
from moetrain.train.log import wandb_run
from moetrain.train.log.background import Background
from moetrain.train.log.options import WandbTracker

tracker = Background("wandb", wandb_run.WandbRun(WandbTracker()), finish_seconds=2)
tracker.start(Path(sys.argv[1]), {})
(service,) = wandb_run._children("wandb-core")
os.kill(service, signal.SIGSTOP)
for step in range(1, 100):
    tracker.log({"step": step}, step)
tracker.finish(True)
print("service", service)
"""


@pytest.mark.real
def test_a_process_ends_although_wandbs_own_is_stopped(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _STOPPED, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    process = Path(f"/proc/{done.stdout.split()[-1]}")  # an orphan, which stays until it is collected
    deadline = time.monotonic() + 20
    while process.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not process.exists()


class Listening(NoTracker):
    def __init__(self) -> None:
        self.config: Mapping[str, Any] = {}
        self.checkpoints: list[tuple[str, int, bool]] = []

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        self.config = config

    def checkpoint(self, folder: Path, step: int) -> None:
        self.checkpoints.append((folder.name, step, (folder / "manifest.json").exists()))


@pytest.mark.usefixtures("training")
@pytest.mark.parametrize("background", ["false", "true"])
def test_a_tracker_hears_of_versions_and_of_whole_checkpoints(background, corpus, tmp_path, monkeypatch):
    tracker = Listening()
    monkeypatch.setitem(TRACKERS, "tensorboard", lambda cfg: tracker)
    options = [*tiny.TRAINED, "tracker=tensorboard", f"checkpoint.async_save={background}"]
    assert tiny.train(corpus, tmp_path / "run", *options) == 0
    assert tracker.checkpoints == [(f"step_{n:08}", n, True) for n in (5, 10, 12)]
    environment = tracker.config["environment"]
    assert {"torch", "git", "packages", "python"} <= environment.keys()
    assert "argv" not in environment

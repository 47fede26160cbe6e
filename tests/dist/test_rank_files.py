"""What ``moetrain status`` says while two ranks train, when one is stopped, and when one is killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import tiny
from lives import Lives

from moetrain.cli import main
from moetrain.parallel.watchdog.rank_record import path_of, read_record

pytestmark = pytest.mark.real
ENDLESS = ["train.steps=100000", "train.eval_every=0", "parallel.ep=2", "model.num_experts=6"]
ENDLESS += ["train.micro_batch_size=1", "checkpoint.every=5"]
SLACK = 60  # seconds, on a busy machine


def wait(condition) -> None:
    until = time.monotonic() + SLACK
    while not condition():
        assert time.monotonic() < until, "did not happen"
        time.sleep(0.05)


def status(run: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["status", str(run)]) == 0
    lines: list[str] = capsys.readouterr().out.splitlines()
    return lines


def test_a_run_whose_rank_is_stopped_and_then_killed(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    command = tiny.command(corpus, run, *ENDLESS, "parallel.timeout=15")
    with Lives([command] * 2, tmp_path) as lives:
        wait(lambda: tiny.rows_written(run) > 3)
        wait(lambda: read_record(path_of(run, 1)).speed is not None)
        lines = status(run, capsys)
        assert "running on 2 rank(s), last step " in lines[1]
        assert [line.split()[:2] for line in lines[5:7]] == [["0", "running"], ["1", "running"]]
        lives.processes[1].kill()
        wait(lambda: read_record(path_of(run, 1)).state(time.time()) == "dead")
        assert lives.code(0, SLACK) == 1
        lines = status(run, capsys)
    assert "1 dead, 1 ended, of 2 rank(s)" in lines[1]
    assert "rank 0: step " in lines[-1]
    assert "rank 1: lost (killed, stopped or cut off), last heard of" in lines[-1]


def test_a_rank_that_stands_still(corpus, tmp_path, capsys):
    """The others say in which collective they wait, and for how long; its own file grows old."""
    run = tmp_path / "run"
    with Lives([tiny.command(corpus, run, *ENDLESS, "parallel.timeout=60")] * 2, tmp_path) as lives:
        wait(lambda: tiny.rows_written(run) > 3)
        pid = lives.processes[1].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            wait(lambda: read_record(path_of(run, 1)).state(time.time()) == "silent")
            wait(lambda: read_record(path_of(run, 0)).seconds > 5)
            lines = status(run, capsys)
        finally:
            os.kill(pid, signal.SIGCONT)
    assert "1 running, 1 silent, of 2 rank(s)" in lines[1]
    waiting = next(line for line in lines if line.startswith("0 "))
    assert ", in " in waiting
    assert "(all_" in waiting

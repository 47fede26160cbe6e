"""Decisions of the batch script's process. Slurm is a stand-in here: tests/launch/test_slurm.py has it."""

from __future__ import annotations

import json
import signal
import socket
import stat
from pathlib import Path

import pytest

from moetrain.errors import STOPPED, UserError
from moetrain.slurm import job as jobs
from moetrain.slurm.job import RESUBMIT, Job


def of(restarts=0, most=3, warned=None) -> Job:
    return Job("17", 2, 4, restarts, most, warned)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """scontrol and sbatch that note their arguments."""
    for name in ("scontrol", "sbatch"):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\n')
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(jobs, "_REQUEUE_SECONDS", 0)
    return tmp_path / "called"


@pytest.mark.parametrize(
    ("job", "code", "before", "now", "requeued"),
    [
        (of(), 0, 0, 9, False),
        (of(warned=signal.SIGUSR1), STOPPED, 0, 9, True),
        (of(warned=signal.SIGUSR1), STOPPED, 9, 9, False),  # no progress
        (of(warned=signal.SIGUSR1, restarts=3), STOPPED, 0, 9, False),  # often enough
        (of(warned=signal.SIGTERM), STOPPED, 0, 9, False),  # cancelled
        (of(), STOPPED, 0, 9, False),  # the STOP file
        (of(), 1, 0, 9, True),  # a lost rank
        (of(), 137, 0, 9, True),
        (of(), 1, 9, 9, False),
        (of(), 2, 0, 9, False),
        (of(), 3, 0, 9, False),
    ],
)
def test_what_comes_after_training(job, code, before, now, requeued, programs):
    assert jobs._after(job, code, before, now) == code
    called = programs.read_text() if programs.exists() else ""
    assert called == ("scontrol requeue 17\n" if requeued else "")


def test_it_submits_itself_again_without_bad_nodes(programs, monkeypatch):
    script = ["train.sbatch", "--", "router=topk"]
    monkeypatch.setenv(RESUBMIT, json.dumps([["sbatch", "--nodes=2", "--exclude=n9"], script]))
    assert jobs._submit_again(of(), {"n3": "no disk"}, 1) == 1
    assert (
        programs.read_text() == "sbatch --nodes=2 --exclude=n9 --exclude=n9,n3 train.sbatch -- router=topk\n"
    )


def test_without_its_command_the_nodes_are_named(programs, monkeypatch, capsys):
    monkeypatch.delenv(RESUBMIT, raising=False)
    assert jobs._submit_again(of(), {"n3": "no disk"}, 1) == 1
    assert "submit it again with --exclude=n3" in capsys.readouterr().err
    assert not programs.exists()


def _could_bind(one: socket.socket, port: int) -> bool:
    try:
        one.bind(("", port))
    except OSError:
        return False
    return True


def test_the_next_free_port():
    with socket.socket() as taken:
        port = next(port for port in range(15_000, 30_000) if _could_bind(taken, port))
        taken.listen()
        assert jobs.free_port(port) > port + 100  # not where the next job begins
    assert jobs.free_port(port) == port


def test_outside_a_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="there is no SLURM_JOB_ID"):
        jobs.this_job(3, 0)


def test_tasks_of_a_node(monkeypatch):
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_GPUS_ON_NODE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    assert (jobs.this_job(3, 1).nodes, jobs.this_job(3, 1).ranks_per_node) == (2, 8)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert jobs.this_job(3, 0).ranks_per_node == 2
    with pytest.raises(UserError, match="--spare-nodes 3 of the job's 3"):
        jobs.this_job(3, 3)


def test_the_newest_step(tmp_path):
    assert jobs.newest_step(tmp_path) == -1
    for name in ("step_00000009", "step_00000010", "step_00000011.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert jobs.newest_step(tmp_path) == 10

"""One folder and two starts of the same command, a folder taken away, and ranks whose launcher is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import tiny

from moetrain.errors import STOPPED

pytestmark = pytest.mark.real
LONG = ["train.steps=100000", "train.eval_every=0", "checkpoint.every=5"]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = {name: folder / name for name in tiny.files(folder)}
    return {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in found.items()}


def refused(run: Path, process: tiny.Process) -> None:
    assert process.wait() == 3
    line = process.output()
    assert line.startswith(f"moetrain: error: the run folder {run} is in use by process "), line
    assert line.count("\n") == 1


def torchrun(corpus: Path, run: Path, ranks: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", *arguments, f"--nproc-per-node={ranks}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    return [*launcher, "-m", "moetrain", *tiny.command(corpus, run, *LONG)]


def test_two_starts_at_once(corpus, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "moetrain", *tiny.command(corpus, run, "train.steps=150")]
    with tiny.Process(command, tmp_path / "a.log") as a, tiny.Process(command, tmp_path / "b.log") as b:
        codes = [a.wait(300), b.wait(300)]
        assert sorted(codes) == [0, 3], a.output() + b.output()
        refused(run, (a, b)[codes.index(3)])
    assert [row["step"] for row in tiny.steps(run)] == list(range(1, 151))
    assert not [name for name in tiny.files(run) if name.startswith(".")]


def test_a_start_beside_a_running_one_and_a_batch_warning(corpus, tmp_path):
    """The first stands still meanwhile, so that any change of the folder would be the second's."""
    run = tmp_path / "run"
    with tiny.started(corpus, run, *LONG) as first:
        first.until(lambda: bool(tiny.checkpoints(run)))
        first.popen.send_signal(signal.SIGSTOP)
        before = contents(run)
        command = [sys.executable, "-m", "moetrain", *tiny.command(corpus, run, *LONG)]
        with tiny.Process(command, tmp_path / "second.log") as second:
            refused(run, second)
        assert contents(run) == before
        first.popen.send_signal(signal.SIGCONT)
        first.popen.send_signal(signal.SIGUSR1)
        assert first.wait() == STOPPED, first.output()
        assert "SIGUSR1: stopping after this step and saving" in first.output()
    assert tiny.checkpoints(run)[-1] == tiny.steps(run)[-1]["step"]


def test_a_removed_folder_ends_the_run(corpus, tmp_path):
    run = tmp_path / "run"
    with tiny.started(corpus, run, *LONG) as process:
        process.until(lambda: bool(tiny.checkpoints(run)))
        run.rename(tmp_path / "gone")
        assert process.wait(30) == 1
        assert f"moetrain: error: the run folder {run} was removed or replaced" in process.output()
        assert "Traceback" not in process.output()
    assert not run.exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_end_when_torchrun_is_killed(ranks, corpus, tmp_path):
    run = tmp_path / "run"
    with tiny.Process(torchrun(corpus, run, ranks), tmp_path / "log") as process:
        process.until(lambda: bool(tiny.checkpoints(run)))
        orphans = tiny.descendants(process.popen.pid)
        assert len(orphans) >= ranks
        process.popen.kill()
        until = time.monotonic() + 15
        try:
            while any(Path(f"/proc/{pid}").exists() for pid in orphans):
                assert time.monotonic() < until, process.output()
                time.sleep(0.05)
        finally:
            for pid in orphans:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)
        assert (
            process.output().count("its launcher (process") + process.output().count("the store is gone") >= 1
        )


@pytest.mark.slow
def test_restarted_ranks_meet_again(corpus, tmp_path):
    """A rank is killed twice; torchrun starts both again on the same store, and the run goes on."""
    run = tmp_path / "run"
    with tiny.Process(torchrun(corpus, run, 2, "--max-restarts=2"), tmp_path / "log") as process:
        killed: set[int] = set()
        for time_of_death in (1, 2):
            process.until(lambda: tiny.rows_written(run) >= 6 * time_of_death)  # noqa: B023
            ranks = [pid for pid in tiny.descendants(process.popen.pid) if pid not in killed]
            os.kill(ranks[-1], signal.SIGKILL)
            killed |= set(ranks)
            process.until(lambda: process.output().count("resuming from") == time_of_death)  # noqa: B023
        rows = tiny.rows_written(run)
        process.until(lambda: tiny.rows_written(run) > rows)
        assert "could not join" not in process.output()

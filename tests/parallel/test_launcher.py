"""A rank ends when its launcher is gone, and a process that no launcher started does not."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moetrain.parallel import launcher

pytestmark = pytest.mark.real

RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
TORCHRUN = {**RANK, "TORCHELASTIC_RUN_ID": "none"}
SLEEPER = """\
import os, sys, time
from moetrain.parallel.launcher import end_with_launcher
end_with_launcher()
assert "torch" not in sys.modules
print(os.getpid(), flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def started(before: str, log: Path, **environment: str) -> Iterator[tuple[int, int]]:
    """A parent and its child, the process in question, which ``before`` starts."""
    kept = {key: value for key, value in os.environ.items() if key not in TORCHRUN}
    kept["PYTHONPATH"] = str(Path(launcher.__file__).parents[2])
    script = f'{before} "$0" -c "$1" >{log} 2>{log}.err & wait'
    arguments = ["sh", "-c", script, sys.executable, SLEEPER]
    hangs_up = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # pytest may run under nohup
    with subprocess.Popen(arguments, env={**kept, **environment}, preexec_fn=hangs_up) as parent:
        wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
        child = int(log.read_text())
        try:
            yield parent.pid, child
        finally:
            for pid in (parent.pid, child):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether it is there and no zombie, which nobody may reap here."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("environment", [RANK, TORCHRUN], ids=["rank variables", "torchrun"])
def test_a_rank_ends_with_its_launcher(environment, tmp_path):
    note = tmp_path / "note.json"
    with started("", tmp_path / "log", TORCHELASTIC_ERROR_FILE=str(note), **environment) as (parent, child):
        os.kill(parent, signal.SIGKILL)
        wait_for(lambda: not runs(child))
    line = (
        f"rank 1: its launcher (process {parent}) is gone, so this rank ends; "
        "the same command goes on from the last checkpoint"
    )
    assert (tmp_path / "log.err").read_text() == f"moetrain: error: {line}\n"
    assert line in note.read_text()


@pytest.mark.parametrize(
    ("before", "environment"),
    [("", {}), ("nohup", {}), ("nohup", RANK)],
    ids=["plain", "nohup", "rank by hand"],
)
def test_a_process_of_no_launcher_outlives_its_shell(before, environment, tmp_path):
    with started(before, tmp_path / "log", **environment) as (parent, child):
        os.kill(parent, signal.SIGKILL)
        time.sleep(2.5 * launcher._POLL)
        assert runs(child)

"""All ranks stop at the same step, whoever was asked, and notice a dead one."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from moetrain.parallel.ranks import run_ranks
from moetrain.parallel.watchdog.peer_errors import PeerLostError
from moetrain.train.stopping import StopFlag


def _steps(rank: int, world: int, folder: str, asked: int, how: str, own_group: bool) -> tuple:
    group = dist.new_group(backend="gloo") if own_group else None
    with StopFlag(Path(folder) / "STOP", group=group) as flag:
        for step in range(1, 100):
            if step == 7 and rank == asked:
                if how == "file":
                    (Path(folder) / "STOP").touch()
                else:
                    os.kill(os.getpid(), signal.SIGTERM)
            if flag.agree():
                return step, flag.reason
    return -1, None


@pytest.mark.parametrize("own_group", [False, True])
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, asked, own_group):
    results = run_ranks(_steps, 2, str(tmp_path), asked, "signal", own_group)
    assert [step for step, _ in results] == [7, 7]
    assert results[asked][1] == "SIGTERM"
    assert results[1 - asked][1] == "another rank was asked to stop"


def test_the_stop_file_stops_all_ranks_and_is_removed(tmp_path):
    results = run_ranks(_steps, 3, str(tmp_path), 0, "file", False)
    assert [step for step, _ in results] == [7, 7, 7]
    assert not (tmp_path / "STOP").exists()


def _dead(rank: int, world: int, folder: str) -> str:
    done = Path(folder, "done")
    with StopFlag() as flag:
        flag.agree()
        if rank == 1:
            dist.destroy_process_group()  # its connections close as those of a killed process do
            while not done.exists():
                time.sleep(0.01)
            return ""
        try:
            for _ in range(3):
                flag.agree()
            return "no error"
        except PeerLostError as error:
            return str(error)
        finally:
            done.touch()


def test_a_dead_rank_is_an_error_and_not_a_stop(tmp_path):
    message = run_ranks(_dead, 2, str(tmp_path), timeout=30)[0]
    assert message.startswith("rank 0 of 2 lost contact with another rank ("), message
    assert "nothing was saved" in message
    assert "/gloo/" not in message


def _silent(rank: int, world: int, folder: str) -> str:
    done = Path(folder, "done")
    group = dist.new_group(timeout=timedelta(seconds=1), backend="gloo")
    with StopFlag(group=group) as flag:
        flag.agree()
        if rank == 1:  # alive, but it does not come
            while not done.exists():
                time.sleep(0.01)
            return ""
        try:
            flag.agree()
            return "no error"
        except PeerLostError as error:
            return str(error)
        finally:
            done.touch()


def test_a_missing_rank_is_an_error_after_the_groups_timeout(tmp_path):
    message = run_ranks(_silent, 2, str(tmp_path), timeout=30)[0]
    assert "lost contact with another rank (" in message

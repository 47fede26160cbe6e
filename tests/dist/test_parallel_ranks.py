"""run_ranks: results in rank order, the first failure by name, and nothing left behind."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moetrain.parallel.ranks import RankError, RanksTimeoutError, run_ranks


def _sum(rank: int, world_size: int, offset: float) -> tuple[int, torch.Tensor]:
    value = torch.tensor([offset + rank], dtype=torch.float64)
    dist.all_reduce(value)
    return os.getpid(), value


def _fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("the cause")
    dist.barrier()


def _die_on_zero(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(3)
    dist.barrier()


def _abort_on_zero(rank: int, world_size: int) -> None:
    if rank == 0:
        os.abort()
    dist.barrier()


def _is_connected(any_socket: socket.socket) -> bool:
    try:
        any_socket.getpeername()
    except OSError:
        return False
    return True


def _die_slowly_on_zero(rank: int, world_size: int) -> None:
    """A process that dies loses its sockets one by one: here its peer's half a second before the report's."""
    dist.barrier()
    if rank == 0:
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError), socket.socket(fileno=int(path.name)) as open_socket:
                if open_socket.family in (socket.AF_INET, socket.AF_INET6) and _is_connected(open_socket):
                    open_socket.shutdown(socket.SHUT_RDWR)
                open_socket.detach()
        time.sleep(0.5)
        os._exit(3)
    dist.barrier()


def _hang_on_one(rank: int, world_size: int, folder: str) -> None:
    if rank == 1:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(folder, "pids").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)


def _exists(pid: int) -> bool:
    """Whether the process runs; one that ended but was not yet collected does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_in_rank_order_and_tensors_by_value():
    results = run_ranks(_sum, 3, 0.5)
    assert [float(value) for _, value in results] == [4.5] * 3
    pids = [pid for pid, _ in results]
    assert len(set(pids)) == 3
    assert not any(_exists(pid) for pid in pids)


def test_the_first_failure_is_raised_with_rank_and_traceback():
    with pytest.raises(RankError, match="rank 1 of 2 failed with KeyError") as error:
        run_ranks(_fail_on_one, 2)
    assert "the cause" in error.value.text
    assert "_fail_on_one" in error.value.text


def test_a_fault_in_native_code_tells_where_the_rank_was():
    with pytest.raises(
        RankError, match=r"exit code -6\)\nFatal Python error: Aborted\n[\s\S]*_abort_on_zero"
    ):
        run_ranks(_abort_on_zero, 2)


def test_a_rank_that_dies_is_named():
    with pytest.raises(RankError, match=r"rank 0 of 2 failed with death:\n.*exit code 3"):
        run_ranks(_die_on_zero, 2)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_a_dead_rank_is_named_though_its_peer_reports_first():
    with pytest.raises(RankError, match=r"rank 0 of 2 failed with death:\n.*exit code 3"):
        run_ranks(_die_slowly_on_zero, 2)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_timeout_names_unfinished_ranks_and_kills_children(tmp_path):
    with pytest.raises(RanksTimeoutError) as error:
        run_ranks(_hang_on_one, 2, str(tmp_path), timeout=3)
    assert error.value.unfinished == [1]
    assert "rank 1 was at" in str(error.value)
    assert "in _hang_on_one" in str(error.value)
    assert "rank 0 was at" not in str(error.value)
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        for _ in range(200):  # the grandchild is collected by init, a moment later
            if not _exists(pid):
                break
            time.sleep(0.01)
        assert not _exists(pid)

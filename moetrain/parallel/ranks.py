"""Run a function in several real processes that share a gloo process group.

``run_ranks(fn, world_size, *args)`` calls ``fn(rank, world_size, *args)`` once per rank and returns the
results in rank order. ``fn`` is a module-level function; its arguments and results are pickled, tensors by
value. Every rank has one thread, the environment that torchrun would give it, and talks over 127.0.0.1.

Processes come from a fork server that has torch imported already and has never run an operator, so a rank
starts in a fraction of a second. Each rank leads its own process group, and the whole group is killed when
the call ends for whatever reason; a rank also ends by itself when the calling process dies. One that has not
returned in time is asked where it is: the error has the stack of each of its threads, and so has that of a
rank which a fault in native code ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

PRELOAD = [  # a test suite may add what its functions' modules import
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch._dynamo",  # FSDP2 and checkpointing import it at their first use, for two seconds a rank
]
_START_TIMEOUT = 120.0
_STACKS_TIMEOUT = 2.0
_GRACE = 2.0  # s; how much later than its peers' broken collectives a dying rank's pipe may close


class RankError(RuntimeError):
    """The first rank that failed: its number, its exception's type name and its traceback as text."""

    def __init__(self, rank: int, world_size: int, kind: str, text: str):
        super().__init__(f"rank {rank} of {world_size} failed with {kind}:\n{text}")
        self.rank, self.kind, self.text = rank, kind, text


class RanksTimeoutError(RuntimeError):
    """``unfinished``: the ranks that had not returned when the time was up; ``stacks``: where they were."""

    def __init__(self, unfinished: list[int], world_size: int, timeout: float, stacks: str = ""):
        super().__init__(f"ranks {unfinished} of {world_size} had not finished after {timeout:g} s{stacks}")
        self.unfinished, self.stacks = unfinished, stacks


@dataclass(frozen=True)
class _Report:
    """The message that a rank sends back: pickled bytes of its result, or the text of its failure."""

    time: float
    result: bytes | None = None
    kind: str = ""
    text: str = ""
    by_a_peer: bool = False  # whether the failure may be what another rank's failure did to this one


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60, init: bool = True
) -> list[Any]:
    """The results of ``fn(rank, world_size, *args)`` for every rank, in rank order.

    ``init=False`` leaves the process group to ``fn`` (the torchrun variables are set). Raises
    :class:`RankError` for the first rank that failed or died and :class:`RanksTimeoutError` after
    ``timeout`` seconds, counted from when all have started. Every process is gone when the call returns.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # The parent serves the store, as torchrun's agent does: no port is picked and then lost to another test.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    call = pickle.dumps((fn, args))
    processes, pipes = [], []
    folder = tempfile.TemporaryDirectory(prefix="moetrain_ranks_")
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            environment = {**os.environ, **torchrun_variables(rank, world_size, store.port)}
            process = context.Process(
                target=_rank_main,
                args=(call, environment, theirs, init, timeout, _stack_file(folder.name, rank)),
                daemon=True,
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        results = _collect(processes, pipes, timeout, folder.name)
        for pipe, process in zip(pipes, processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(True)
            process.join(5)
        return results
    finally:
        _end(processes)
        for pipe in pipes:
            pipe.close()
        folder.cleanup()


def torchrun_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def _collect(processes: list[Any], pipes: list[Any], timeout: float, folder: str) -> list[Any]:
    """Wait until every rank has reported; raise at the first failure or when the time is up."""
    world_size = len(pipes)
    _await_starts(pipes)
    deadline = time.monotonic() + timeout
    reports: dict[int, _Report] = {}
    failed: dict[int, _Report] = {}
    while len(reports) < world_size:
        pending = [rank for rank in range(world_size) if rank not in reports]
        ready = connection.wait([pipes[rank] for rank in pending], max(0.0, deadline - time.monotonic()))
        if not ready and failed:
            break
        if not ready:
            raise RanksTimeoutError(pending, world_size, timeout, _stacks(processes, pending, folder))
        for rank in pending:
            if pipes[rank] in ready:
                stacks = Path(_stack_file(folder, rank))
                reports[rank] = _receive(pipes[rank], processes[rank], stacks)
        failed = {rank: report for rank, report in reports.items() if report.result is None}
        if not all(report.by_a_peer for report in failed.values()):
            break
        if failed:
            deadline = min(deadline, time.monotonic() + _GRACE)
    if failed:
        # A rank's failure breaks its peers' collectives a moment later; the cause is the earliest.
        first = min(failed, key=lambda rank: failed[rank].time)
        raise RankError(first, world_size, failed[first].kind, failed[first].text)
    return [pickle.loads(reports[rank].result or b"") for rank in range(world_size)]


def _await_starts(pipes: list[Any]) -> None:
    """Wait until every rank runs. The first call of a session also waits for the fork server's imports."""
    deadline = time.monotonic() + _START_TIMEOUT
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            raise RanksTimeoutError([rank], len(pipes), _START_TIMEOUT)
        with contextlib.suppress(EOFError, ConnectionError):
            pipe.recv_bytes()


def _receive(pipe: Any, process: Any, stacks: Path) -> _Report:
    try:
        report: _Report = pickle.loads(pipe.recv_bytes())
        return report
    except (EOFError, ConnectionError):
        process.join(5)
        text = f"the process ended without a report (exit code {process.exitcode})"
        if stacks.exists() and (written := stacks.read_text(errors="replace")):  # a fault in native code
            text += f"\n{written}"
        return _Report(time=float("-inf"), kind="death", text=text)


def _stack_file(folder: str, rank: int) -> str:
    return os.path.join(folder, f"rank_{rank}")


def _stacks(processes: list[Any], ranks: list[int], folder: str) -> str:
    """What the threads of ``ranks`` are doing; they need not be able to run Python to tell."""
    files = {rank: Path(_stack_file(folder, rank)) for rank in ranks}
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(processes[rank].pid, signal.SIGUSR2)
    deadline = time.monotonic() + _STACKS_TIMEOUT
    while time.monotonic() < deadline and not all(f.exists() and f.stat().st_size for f in files.values()):
        time.sleep(0.05)
    time.sleep(0.1)  # a stack is written in well under that
    told = {rank: file.read_text() if file.exists() else "" for rank, file in files.items()}
    return "".join(f"\nrank {rank} was at\n{text}" for rank, text in told.items() if text)


def _end(processes: list[Any]) -> None:
    """Kill whatever is left of every rank's process group and wait for the ranks."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    for process in processes:
        process.join()


def _rank_main(
    call: bytes, environment: dict[str, str], pipe: Any, init: bool, timeout: float, stack_file: str
) -> None:
    os.setsid()
    stacks = os.open(stack_file, os.O_WRONLY | os.O_CREAT)
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR2, stacks)
    os.environ.clear()
    os.environ.update(environment)
    die_with_parent()
    torch.set_num_threads(1)
    pipe.send_bytes(b"started")
    try:
        fn, args = pickle.loads(call)
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        if init:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        report = _Report(time.monotonic(), pickle.dumps(fn(rank, world_size, *args)))
    except BaseException as error:
        report = _Report(
            time.monotonic(),
            kind=type(error).__name__,
            text=traceback.format_exc(),
            by_a_peer=isinstance(error, RuntimeError),  # what collectives raise
        )
    pipe.send_bytes(pickle.dumps(report))
    # A rank that closes its sockets early can break a peer that is still reading: leave together.
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    if dist.is_initialized():
        dist.destroy_process_group()


def die_with_parent() -> None:
    parent = multiprocessing.parent_process()

    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()

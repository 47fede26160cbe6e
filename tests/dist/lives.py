"""Ranks of ``moetrain`` that may end as they like: with a code, by a signal, one without the other.

:func:`moetrain.parallel.ranks.run_ranks` ends all ranks when one fails; here each is left alone, as on machines of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from moetrain.parallel import ranks
import torch
import torch.distributed as dist


class Lives:
    """``world`` ranks that run one command line each; their output goes to ``folder/rank_<n>.log``."""

    def __init__(self, commands: list[list[str]], folder: Path, **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(ranks.PRELOAD)
        self.folder, self.world = folder, len(commands)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes: list[Any] = []
        for rank, arguments in enumerate(commands):
            variables = ranks.torchrun_variables(rank, self.world, self._store.port)
            variables |= {"TORCHELASTIC_RUN_ID": "test"}
            target = (arguments, {**os.environ, **variables, **environment}, folder / f"rank_{rank}.log")
            process = context.Process(target=_live, args=target, daemon=True)
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Lives:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def codes(self, seconds: float = 120) -> list[int]:
        """Exit codes in rank order; a killed rank's is negative. An error where one does not end in time."""
        deadline = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            process.join(max(0.0, deadline - time.monotonic()))
            said = self.output(rank)
            assert process.exitcode is not None, f"rank {rank} still runs after {seconds:g} s: {said}"
        return [process.exitcode for process in self.processes]

    def output(self, rank: int) -> str:
        return (self.folder / f"rank_{rank}.log").read_text(errors="replace")


def _live(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ranks.die_with_parent()
    torch.set_num_threads(1)
    import moetrain.report.page
    from moetrain.cli import main

    moetrain.report.page.has_matplotlib = lambda: False  # no time for plots
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""Ranks of ``moetrain`` that may end as they like: with a code, by a signal, one without the other.

:func:`moetrain.parallel.ranks.run_ranks` ends all ranks when one fails; here each is left alone, as on
machines of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import netns
import torch
import torch.distributed as dist

from moetrain.parallel import ranks


class Lives:
    """``world`` ranks that run one command line each; their output goes to ``folder/rank_<n>.log``.

    ``namespaces``: the network namespace of each rank (see netns.py); all in this process's by default.
    """

    def __init__(
        self, commands: list[list[str]], folder: Path, namespaces: Sequence[str] = (), **environment: str
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(ranks.PRELOAD)
        self.folder, self.world = folder, len(commands)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes: list[Any] = []
        for rank, arguments in enumerate(commands):
            variables = ranks.torchrun_variables(rank, self.world, self._store.port)
            variables |= {"TORCHELASTIC_RUN_ID": "test"}
            namespace = namespaces[rank] if namespaces else None
            variables = {**os.environ, **variables, **environment}
            target = (arguments, variables, folder / f"rank_{rank}.log", namespace)
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
        return [self.code(rank, max(0.0, deadline - time.monotonic())) for rank in range(self.world)]

    def code(self, rank: int, seconds: float = 120) -> int:
        """The exit code of one rank, likewise."""
        self.processes[rank].join(seconds)
        code: int | None = self.processes[rank].exitcode
        assert code is not None, f"rank {rank} still runs after {seconds:g} s: {self.output(rank)}"
        return code

    def output(self, rank: int) -> str:
        return (self.folder / f"rank_{rank}.log").read_text(errors="replace")


def _live(arguments: list[str], environment: dict[str, str], log: Path, namespace: str | None) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if namespace is not None:
        netns.enter(namespace)
    ranks.die_with_parent()
    torch.set_num_threads(1)
    import moetrain.report.page
    from moetrain.cli import main

    moetrain.report.page.has_matplotlib = lambda: False  # no time for plots
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

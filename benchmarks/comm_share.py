"""The share of a run's time that a rank waits for collectives; a plug-in of ``moetrain train``.

    PYTHONPATH=benchmarks torchrun --nproc-per-node 4 -m moetrain train parallel.ep=4 'plugins=[comm_share]'

Counted is what the main thread spends in ``Work.wait``, which every collective of the trainer, of FSDP2 and
of the dispatchers ends with on a CPU: on busy cores that is waiting for slower ranks too. All optimizer steps
but the first count, and nothing between them; each rank prints a line at its end.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from typing import Any

from torch._C._distributed_c10d import Work

from moetrain.train.step import TrainStep

_in_step = False
_steps = 0  # the first included, which allocates and imports
_waited = _stepped = 0.0  # seconds
_waits = 0


def _timed_wait(wait: Callable[..., Any]) -> Callable[..., Any]:
    def timed(self: Work, *args: Any) -> Any:
        global _waited, _waits
        begun = time.perf_counter()
        result = wait(self, *args)
        if _in_step and _steps:
            _waited, _waits = _waited + time.perf_counter() - begun, _waits + 1
        return result

    return timed


def _timed_step(run: Callable[..., Any]) -> Callable[..., Any]:
    def timed(self: TrainStep, *args: Any) -> Any:
        global _in_step, _stepped, _steps
        _in_step, begun = True, time.perf_counter()
        result = run(self, *args)
        _stepped += time.perf_counter() - begun if _steps else 0.0
        _in_step, _steps = False, _steps + 1
        return result

    return timed


def _tell() -> None:
    if _steps > 1:
        print(
            f"rank {os.environ.get('RANK', '0')}: {_stepped:.1f} s in {_steps - 1} steps, of which waiting "
            f"{_waited:.1f} s ({_waited / _stepped:.0%}), {_waits / (_steps - 1):.0f} times a step",
            flush=True,
        )


Work.wait = _timed_wait(Work.wait)  # type: ignore[method-assign]
TrainStep.run = _timed_step(TrainStep.run)  # type: ignore[method-assign]
atexit.register(_tell)

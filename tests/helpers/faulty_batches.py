"""A plug-in for tests: in step 3 (from 0) rank 1 brings one micro-batch less or more.

Loaded by ``plugins=[faulty_batches]``; the environment variable FAULTY_BATCHES is ``less`` or ``more``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from moetrain.data import Batch
from moetrain.train.step import StepResult, TrainStep

_run = TrainStep.run


def _run_out_of_step(self: TrainStep, step: int, batches: Sequence[Batch]) -> StepResult:
    if step == 3 and os.environ["RANK"] == "1":
        less = os.environ["FAULTY_BATCHES"] == "less"
        batches = batches[:-1] if less else [*batches, batches[0]]
    return _run(self, step, batches)


TrainStep.run = _run_out_of_step  # type: ignore[method-assign]

"""Alarms on healthy runs: trains a comparison of routers, keeps each step's figures, and replays them.

    python benchmarks/alarms.py record FOLDER [overrides]   # a queue: the same command goes on where it stopped
    python benchmarks/alarms.py replay FOLDER [overrides]   # counts runs and alarms, with any thresholds

``record`` is ``moetrain train experiment=router_comparison``, whose runs also keep ``figures.jsonl``: a step's
loss, speed and routing sums, so that other thresholds need no other training.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from moetrain.cli import main as moetrain
from moetrain.report import page
from moetrain.train.log.jsonl import JsonlFile
from moetrain.train.loop import Loop
from moetrain.train.step import StepResult

FIGURES = "figures.jsonl"


def record(folder: Path, overrides: list[str]) -> int:
    """Train the queue with a loop that also keeps its figures; the exit code of ``moetrain train``."""
    report = Loop._report
    files: dict[Path, JsonlFile] = {}

    def reporting(loop: Loop, result: StepResult, lr: float) -> None:
        report(loop, result, lr)
        path = loop.services.run_dir.path / FIGURES
        if path not in files:
            files[path] = JsonlFile(path)
            files[path].truncate_after(loop.state.step - 1)
        files[path].append(row_of(result, loop.state.step))

    Loop._report = reporting  # type: ignore[method-assign]
    page.has_matplotlib = lambda: False  # the plots of a report take longer than a tenth of a run
    return moetrain(["train", "experiment=router_comparison", f"run.dir={folder}", *overrides])


def row_of(result: StepResult, step: int) -> dict[str, Any]:
    experts = [[layer, number] for layer, number in result.routing.experts.items()]
    sums = result.routing.sums_F.tolist()
    return {"step": step, "loss": result.loss, "tokens": result.tokens, "experts": experts, "sums": sums}


def main() -> int:
    mode, folder, *overrides = sys.argv[1:]
    return record(Path(folder), overrides)


if __name__ == "__main__":
    sys.exit(main())

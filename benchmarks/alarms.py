"""Alarms on healthy runs: trains a comparison of routers, keeps each step's figures, and replays them.

    python benchmarks/alarms.py record FOLDER [overrides]   # a queue: the same command goes on
    python benchmarks/alarms.py replay FOLDER [overrides]   # counts runs and alarms, with any thresholds
    python benchmarks/alarms.py cost                        # all alarms' time in a step of a large model

``record`` is ``moetrain train experiment=router_comparison``, whose runs also keep ``figures.jsonl``: a
step's loss and routing sums, so that other thresholds need no other training.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from moetrain.cli import main as moetrain
from moetrain.config.hydra.compose import compose_train
from moetrain.report import page
from moetrain.train.alarms import AlarmWatch, StepFigures
from moetrain.train.alarms.options import AlarmsConfig
from moetrain.train.log.jsonl import JsonlFile, read_metrics
from moetrain.train.log.metrics import RoutingSummary
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

    Loop._report = reporting  # type: ignore[assignment, method-assign]
    page.has_matplotlib = lambda: False  # the plots of a report take longer than a tenth of a run
    return moetrain(["train", "experiment=router_comparison", f"run.dir={folder}", *overrides])


def row_of(result: StepResult, step: int) -> dict[str, Any]:
    experts = [[layer, number] for layer, number in result.routing.experts.items()]
    sums = result.routing.sums_F.tolist()
    return {"step": step, "loss": result.loss, "tokens": result.tokens, "experts": experts, "sums": sums}


def replay(folder: Path, overrides: list[str]) -> int:
    """Print every alarm of the runs whose steps are all there, and both counts; 1 where there is an alarm."""
    cfg = compose_train(["experiment=router_comparison", *overrides])
    raised: Counter[str] = Counter()
    runs = with_experts = 0
    for path in sorted(folder.glob(f"*/seed_*/{FIGURES}")):
        figures = figures_of(path)
        if len(figures) < cfg.train.steps:
            continue
        runs, with_experts = runs + 1, with_experts + bool(figures[0].demand)
        for line, alarm in alarms_of(cfg.alarms, figures):
            raised[alarm] += 1
            print(f"{path.parent.relative_to(folder)}: {line}")
    alarms = ", ".join(f"{number} {name}" for name, number in raised.items()) or "none"
    print(f"{runs} runs of {cfg.train.steps} steps ({with_experts} with experts), alarms raised: {alarms}")
    return int(bool(raised))


def figures_of(path: Path) -> list[StepFigures]:
    """What the alarms of a run saw, from its recorded sums and its rows."""
    rows = {row["step"]: row for row in read_metrics(path.parent) if "train/loss" in row}
    found = []
    for kept in read_metrics(path):
        sums_F = torch.tensor(kept["sums"], dtype=torch.float64)
        routing = RoutingSummary(dict(kept["experts"]), sums_F)
        found.append(StepFigures.of(rows[kept["step"]] | routing.metrics(), routing))
    return found


def alarms_of(cfg: AlarmsConfig, figures: list[StepFigures]) -> list[tuple[str, str]]:
    watch = AlarmWatch(cfg, lambda name: None, {}, 0.0)
    events = [event for each in figures for event in watch.observe(each)]
    return [(event.line(), event.alarm) for event in events if event.raised]


def cost(layers: int = 64, experts: int = 128, steps: int = 200) -> int:
    """Print the processor's time that all alarms take in one step of a large model."""
    generator = torch.Generator().manual_seed(0)
    sums_F = torch.cat([torch.randint(1, 99, (2 * experts + 6,), generator=generator) for _ in range(layers)])
    routing = RoutingSummary(dict.fromkeys(range(layers), experts), sums_F.double())
    row = routing.metrics() | {"train/loss": 3.0, "tokens_per_second": 1e5}
    watch = AlarmWatch(AlarmsConfig(), lambda name: None, {}, 0.0)
    begun = time.process_time()
    for step in range(1, steps + 1):
        watch.observe(StepFigures.of(row | {"step": step, "time": step}, routing))
    each = (time.process_time() - begun) / steps
    print(f"alarms: {1e3 * each:.2f} ms a step, {layers} layers of {experts} experts")
    return 0


def main() -> int:
    if sys.argv[1:] == ["cost"]:
        return cost() or cost(layers=6, experts=16)
    mode, folder, *overrides = sys.argv[1:]
    return {"record": record, "replay": replay}[mode](Path(folder), overrides)


if __name__ == "__main__":
    sys.exit(main())

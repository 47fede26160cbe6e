"""Paired, interleaved timing, and a description of the machine to go with every figure."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def interleaved(
    runs: dict[str, Callable[[int], None]],
    repetitions: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Seconds by ``clock`` per repetition, after ``warm_up``; in each every run goes once, in random order.

    A run's time ends when ``device`` has finished its work. The order is random, since what ran before leaves
    the heap and the caches in its own state: in a rotation every run would always follow the same one.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    draw = random.Random(0)
    for repetition in range(warm_up + repetitions):
        for name in draw.sample(names, len(names)):
            start = clock()
            runs[name](repetition)
            finish(device)
            if repetition >= warm_up:
                times[name].append(clock() - start)
    return times


def finish(device: str) -> None:
    """Wait until what was launched on ``device`` is done; nothing to wait for on a CPU."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """Median of the paired ratios time[over] / time[under]: above 1 where ``under`` is the faster."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            x.split(":", 1)[1].strip() for x in cpuinfo.read_text().splitlines() if x.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        **(
            {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
            if torch.cuda.is_available()
            else {}
        ),
    }


def device_of(parser: argparse.ArgumentParser, asked: str) -> str:
    """``asked``, or the parser's one-line refusal of a CUDA device where there is none."""
    if asked != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {asked}: torch {torch.__version__} sees no CUDA device; take --device cpu")
    return asked


def write_json(path: str | None, result: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {path}")

"""What saves cost: steps without one, with one written meanwhile (async_save), and with one waited for.

    python benchmarks/saves.py [--every 25] [--windows 12] [--fsync 0] [--folder DIR] [--json FILE]

One process trains ``model=tiny`` on generated text. A window is ``--every`` steps that begin with a save, or
with none; all three kinds go once in each of ``--windows`` rounds, in random order, and each window is
compared with that of the same round without a save. Seconds are the machine's; seconds of CPU are the
training thread's own, and depend little on what else runs there. ``--fsync`` makes each flush of a file take
that many seconds longer: a slow disk.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kill_resume import write_text
from timing import machine, write_json

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.config.checked import checked
from moetrain.train.start import Built, build

NONE, ASYNC, SYNC = "no save", "written meanwhile", "waited for"


class Trainer:
    """Steps of a model, and its saves by two checkpointers."""

    def __init__(self, built: Built, folder: Path) -> None:
        self.built, self.state = built, built.state
        self.savers = {name: Checkpointer(folder / name, async_save=name == ASYNC) for name in (ASYNC, SYNC)}
        self.late = 0  # windows that ended before their save did

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.built.step.run(self.state.step, self.state.loader.next_step())
            self.state.step += 1

    def window(self, name: str, steps: int) -> dict[str, float]:
        """Seconds and seconds of CPU of a window, and of the save's call in it."""
        began, cpu = time.perf_counter(), time.thread_time()
        if name != NONE:
            self.state.save(self.savers[name])
        called, cpu_called = time.perf_counter(), time.thread_time()
        self.steps(steps)
        ended, cpu_ended = time.perf_counter(), time.thread_time()
        if name == ASYNC:
            pending = self.savers[name]._pending
            self.late += pending is None or not pending[0].done()
            self.savers[name].wait()
        return {
            "seconds": ended - began, "cpu": cpu_ended - cpu,
            "call": called - began, "call_cpu": cpu_called - cpu,
        }  # fmt: skip


def measure(trainer: Trainer, every: int, windows: int) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {NONE: [], ASYNC: [], SYNC: []}
    draw = random.Random(0)
    trainer.steps(every)
    for name in (ASYNC, SYNC):
        trainer.window(name, 1)
    trainer.late = 0
    for _ in range(windows):
        for name in draw.sample(list(found), len(found)):
            found[name].append(trainer.window(name, every))
    return found


def shares(found: dict[str, list[dict[str, float]]], name: str, key: str) -> list[float]:
    """Of each round, by how much of itself a window is longer than that without a save."""
    return [a[key] / b[key] - 1 for a, b in zip(found[name], found[NONE], strict=True)]


def table(found: dict[str, list[dict[str, float]]], every: int) -> str:
    def middle(name: str, key: str) -> float:
        return statistics.median(row[key] for row in found[name])

    lines = [f"| a save every {every} steps | step | call | more a step | more CPU of the training thread |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name in found:
        step = f"{1e3 * middle(name, 'seconds') / every:.1f} ms"
        call = f"{1e3 * middle(name, 'call'):.1f} ms"
        more = "-" if name == NONE else f"{100 * statistics.median(shares(found, name, 'seconds')):.1f} %"
        cpu = "-" if name == NONE else f"{100 * statistics.median(shares(found, name, 'cpu')):.1f} %"
        lines.append(f"| {name} | {step} | {call} | {more} | {cpu} |")
    return "\n".join(lines)


def slow_flushes(seconds: float) -> None:
    fsync: Callable[[int], None] = os.fsync

    def slowly(descriptor: int) -> None:
        time.sleep(seconds)
        fsync(descriptor)

    os.fsync = slowly  # type: ignore[assignment]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--fsync", type=float, default=0.0)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="moetrain-saves-") as temporary:
        write_text(Path(temporary) / "text")
        data = ["data=local", f"data.path={temporary}/text", f"data.cache_dir={temporary}/cache"]
        data += ["data.tokenizer.kind=bytes", "data.seq_len=128"]
        cfg, _ = checked([*data, *args.overrides])
        trainer = Trainer(build(cfg, "cpu"), (args.folder or Path(temporary)) / "checkpoints")
        slow_flushes(args.fsync)
        found = measure(trainer, args.every, args.windows)
    size = sum(t.numel() * t.element_size() for t in trainer.state.tensors().values())
    print(f"{size / 1e6:.1f} MB a checkpoint, {args.fsync:g} s more a flush")
    print(table(found, args.every))
    print(f"saves that were still being written at the end of their window: {trainer.late} of {args.windows}")
    result: dict[str, Any] = {"windows": found, "every": args.every, "bytes": size, "late": trainer.late}
    write_json(args.json, result | {"fsync": args.fsync, "machine": machine()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The display of training: a bar on a terminal, short plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from moetrain.terminal import printable, tell
from moetrain.train.log.metrics import worst_load

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """The silent display, for every rank but the first; also the base class of the two that print.

    A context manager. ``step`` takes each optimizer step's row of ``metrics.jsonl``, ``evaluation`` each
    evaluation's; ``say`` prints one line. ``total`` is ``train.steps``, ``done`` the steps already trained.
    """

    def __init__(self, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.done = done
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque([(clock(), done)], maxlen=50)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def step(self, row: Mapping[str, Any]) -> None:
        self.done = int(row["step"])
        self._recent.append((self._clock(), self.done))

    def evaluation(self, row: Mapping[str, Any]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def remaining(self) -> float | None:
        """Seconds to the last step at the last 50 steps' pace, evaluations included; None if unknown."""
        (then, first), (now, last) = self._recent[0], self._recent[-1]
        return (now - then) / (last - first) * max(0, self.total - last) if last > first else None


class PlainProgress(Progress):
    """Lines for a file or a pipe: the first and last step, each twentieth of the run, each 30 seconds."""

    def __init__(
        self,
        total: int,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
        every_steps: int | None = None,
        every_seconds: float = 30.0,
    ) -> None:
        super().__init__(total, done, clock)
        self._stream = stream
        self._every_steps = every_steps or max(1, total // 20)
        self._every_seconds = every_seconds
        self._next_step = done + 1
        self._next_time = clock()

    def step(self, row: Mapping[str, Any]) -> None:
        super().step(row)
        now = self._clock()
        if self.done >= self._next_step or self.done >= self.total or now >= self._next_time:
            self._next_step = (self.done // self._every_steps + 1) * self._every_steps
            self._next_time = now + self._every_seconds
            self.say(step_line(row, self.total, self.remaining()))

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self.say(evaluation_line(row, self.total))

    def say(self, text: str) -> None:
        tell(text, self._stream)


class BarProgress(Progress):
    """A bar with step, loss, speed, time left and the worst layer's load; other lines scroll above it."""

    def __init__(
        self,
        total: int,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
        console: Console | None = None,
    ) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        super().__init__(total, done, clock)
        self._bar = RichProgress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total, completed=done, status="starting")

    def __enter__(self) -> BarProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, row: Mapping[str, Any]) -> None:
        super().step(row)
        parts = _status(row, self.remaining())
        room = (
            self._bar.console.width - 2 * len(str(self.total)) - 12
        )  # a narrow terminal shows fewer figures
        while len(parts) > 1 and len("  ".join(parts)) > room:
            parts.pop()
        self._bar.update(self._task, completed=self.done, status="  ".join(parts))

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self.say(evaluation_line(row, self.total))

    def say(self, text: str) -> None:
        console = self._bar.console
        console.print(printable(text, console.encoding), markup=False, highlight=False, emoji=False)


def build_progress(total: int, done: int = 0, rank: int = 0) -> Progress:
    """The display for this process: silent off rank 0, a bar on a terminal, plain lines otherwise."""
    if rank != 0:
        return Progress(total, done)
    from rich.console import Console

    console = Console()
    # rich calls a pipe a terminal when FORCE_COLOR is set, and a bar would fill a log file.
    if sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal:
        return BarProgress(total, done, console=console)
    return PlainProgress(total, done)


def step_line(row: Mapping[str, Any], total: int, remaining: float | None) -> str:
    width = len(str(total))
    return "  ".join([f"step {int(row['step']):>{width}}/{total}", *_status(row, remaining)])


def evaluation_line(row: Mapping[str, Any], total: int) -> str:
    width = len(str(total))
    figures = f"val loss {row['val/loss']:.4f}  perplexity {row['val/perplexity']:.2f}"
    return f"step {int(row['step']):>{width}}/{total}  {figures}  bits/byte {row['val/bits_per_byte']:.4f}"


def _status(row: Mapping[str, Any], remaining: float | None) -> list[str]:
    parts = [f"loss {row['train/loss']:.4f}", f"{short_number(row['tokens_per_second']):>5} tok/s"]
    parts.append(f"eta {short_time(remaining):>5}")
    if worst := worst_load(row):
        parts.append(f"load {worst[1]:.2f}x (layer {worst[0]})")
    return parts


def short_number(value: float) -> str:
    """Three digits and a unit: 950, 12.3k, 1.05M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            value /= size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"
    return f"{value:.0f}"


def short_time(seconds: float | None) -> str:
    """``42s``, ``3:05`` (minutes), ``2:07:09`` (hours) or ``3d04h``; ``-`` for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02}h"
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest}s"

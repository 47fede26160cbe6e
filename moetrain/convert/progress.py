"""How far a conversion is: a bar on a terminal, a line for each tenth anywhere else; on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from moetrain.terminal import printable, tell

_GIGA = 1e9
_SILENT = 100e6  # bytes that take no time to speak of


class Advance(Protocol):
    def __call__(self, nbytes: int) -> None: ...


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """``what`` is done to ``total`` bytes; call the value with the size of each part that is done."""
    if not sys.stderr.isatty():
        yield _Lines(what, total) if total > _SILENT else (lambda nbytes: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(printable(what), total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


class _Lines:
    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done, self._tenth = what, total, 0, 0

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        tenth = 10 * self._done // self._total if self._total else 10
        if tenth > self._tenth:
            self._tenth = tenth
            share = f"{self._done / _GIGA:.2f} of {self._total / _GIGA:.2f} GB"
            tell(f"{self._what}: {10 * tenth} % ({share})", sys.stderr)

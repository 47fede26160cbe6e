"""The interface of a tracker, and the one that does nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from moetrain.train.log.loads import Loads


class Tracker(Protocol):
    """What a run tells a tracker, on rank 0 only and from one thread.

    ``step`` of :meth:`start` is the last finished step of a resumed run, 0 for a fresh one. ``config``: the
    composed config as plain values. ``loads`` of :meth:`log` come with at most 200 rows a run. ``checkpoint``
    names a folder that is complete. ``finish(ok=False)`` marks the run as failed. ``abandon`` is called, from
    another thread, where finish takes too long: it ends what the interpreter would wait for at its exit.
    """

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None: ...

    def log(self, row: Mapping[str, Any], step: int, loads: Loads | None = None) -> None: ...

    def alert(self, title: str, text: str, step: int) -> None: ...

    def checkpoint(self, folder: Path, step: int) -> None: ...

    def finish(self, ok: bool) -> None: ...

    def abandon(self) -> None: ...


class NoTracker:
    """The tracker that does nothing: of ``tracker=jsonl``, and of every rank but the first."""

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int = 0) -> None:
        pass

    def log(self, row: Mapping[str, Any], step: int, loads: Loads | None = None) -> None:
        pass

    def alert(self, title: str, text: str, step: int) -> None:
        pass

    def checkpoint(self, folder: Path, step: int) -> None:
        pass

    def finish(self, ok: bool) -> None:
        pass

    def abandon(self) -> None:
        pass


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numeric entries of a row; NaN stays (both services show it), None and text go."""
    return {k: float(v) for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}

"""The record of what a rank does, in a small file of the run folder: ``ranks/rank_00003.json``.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from moetrain.errors import UserError, shortened
from moetrain.files import read_json
from moetrain.parallel.process import TEXT, boot_id, process_runs
from moetrain.terminal import one_line

RANKS = "ranks"  # the folder
FINISHED = "finished"  # ``ended`` of a rank that has made all steps
SIZE = 4096  # bytes of a file
DOING, WRONG = 300, 900  # characters
_OVERDUE = 5  # beats
_TRIES = 3

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Number = Annotated[float, Field(ge=0, lt=1e300, allow_inf_nan=False)]
_Name = Annotated[str, Field(max_length=TEXT)]


@dataclass(frozen=True)
class RankRecord:
    """One rank at its last beat. Times are seconds since 1970.

    boot       names the start of the machine ``host``.
    every      seconds between two beats.
    doing      the phase, and the collective: ``step 8, in blocks.1, weights (all_gather, forward)``.
    seconds    how long it had been doing that.
    speed      tokens of all ranks per second over the last steps; None before the first.
    ended      how this process ended; empty while it runs.
    wrong      what went wrong last on this rank, in this start or an earlier one; ``wrong_at``: when.
    """

    rank: _Count
    world: _Count
    host: _Name
    boot: _Name
    pid: _Count
    start: _Number
    beat: _Number
    every: _Number
    doing: Annotated[str, Field(max_length=DOING)]
    seconds: _Number
    speed: _Number | None = None
    ended: Annotated[str, Field(max_length=WRONG)] = ""
    wrong: Annotated[str, Field(max_length=WRONG)] = ""
    wrong_at: _Number = 0.0

    def silent(self, now: float) -> float:
        """Seconds since the last beat; 0 where the clock went back."""
        return max(0.0, now - self.beat)

    def state(self, now: float) -> str:
        """``running``, ``dead``, ``silent``, or how it ended."""
        if self.ended:
            return self.ended
        silent = self.silent(now)
        if silent > 2 * self.every and self.boot == boot_id() and not process_runs(self.pid):
            return "dead"
        return "silent" if silent > _OVERDUE * self.every else "running"


def path_of(run: Path, rank: int) -> Path:
    return run / RANKS / f"rank_{rank:05d}.json"


def read_record(path: Path) -> RankRecord:
    """Raises UserError for a file that is none."""
    for attempt in range(_TRIES):
        try:
            return read_json(path, RankRecord, SIZE)
        except UserError:  # half of it may be the next beat's
            if attempt == _TRIES - 1:
                raise
            time.sleep(0.05)
    raise AssertionError("unreachable")


def read_records(run: Path) -> list[RankRecord]:
    """Those of the ranks of a run folder, by number; files that are none are passed over."""
    found = []
    for path in sorted((run / RANKS).glob("rank_*.json")):
        with contextlib.suppress(UserError):
            found.append(read_record(path))
    return found


def fit(text: str, most: int) -> str:
    """At most ``most`` characters that JSON writes as two bytes at the most."""
    return shortened(one_line(text).encode("ascii", "replace").decode(), most)

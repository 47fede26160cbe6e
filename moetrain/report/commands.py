"""``moetrain report`` and ``moetrain status``: plain arguments, no Hydra."""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

from moetrain.parallel.watchdog.rank_record import read_records
from moetrain.report.page import write_report
from moetrain.report.ranks import last_wrong, newest_start, rank_table, state_of_all
from moetrain.report.runs import RunData, check_run_folder, read_runs
from moetrain.report.tables import (
    NOTHING,
    duration,
    latest,
    planned_steps,
    standing_alarms,
    status,
    whole,
)
from moetrain.terminal import one_line, show

_WIDTH = 200  # characters of a cell


def report_command(argv: Sequence[str]) -> int:
    """Write the report of the run folders in ``argv`` and print its path. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="moetrain report", description="Plots and tables of one or more runs in one HTML file."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, such as runs/NAME")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="default: report.html in the run folder; for several runs, in the working directory",
    )
    args = parser.parse_args(argv)
    default = args.runs[0] / "report.html" if len(args.runs) == 1 else Path("report.html")
    show(str(write_report(args.runs, args.output or default)))
    return 0


def status_command(argv: Sequence[str]) -> int:
    """Print a line per run folder (step, loss, speed, last checkpoint, state), then what its ranks do.

    Then the alarms that were raised, in a run that is over too.

    Raises UserError.
    """
    parser = argparse.ArgumentParser(prog="moetrain status", description="Where each run stands.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, such as runs/NAME")
    for path in (runs := parser.parse_args(argv).runs):
        check_run_folder(path)
    head = ["run", "step", "loss", "val loss", "tokens/s", "last checkpoint", "state"]
    found, now = read_runs(runs), time.time()
    show(_aligned([head, *(_status_row(run, now) for run in found)]))
    for run in found:
        _show_ranks(run, now)
        _show_alarms(run)
    return 0


def last_checkpoint(run_dir: Path) -> str | None:
    """Name of the checkpoint with the highest step; unfinished ones (hidden or ``.tmp``) do not count."""
    folder = run_dir / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    found = [(int(m.group(1)), name) for name in names if (m := re.fullmatch(r"[A-Za-z]\w*?(\d+)", name))]
    return max(found)[1] if found else None


def _status_row(run: RunData, now: float) -> list[str]:
    step, planned, speed = run.last("step"), planned_steps(run), run.last("tokens_per_second")
    done = f"{step:.0f}" if math.isfinite(step) else NOTHING
    return [
        run.name,
        f"{done}/{planned:.0f}" if math.isfinite(planned) else done,
        latest(run, "train/loss", 4),
        latest(run, "val/loss", 4),
        whole(speed),
        last_checkpoint(run.path) or NOTHING,
        _state(run, now),
    ]


def _state(run: RunData, now: float) -> str:
    """As in the report; of a run without a summary what its ranks say, and the time of its last step."""
    if run.summary:
        return status(run)
    when, ranks = run.last("time"), newest_start(read_records(run.path))
    state = state_of_all(ranks, now) if ranks else "unfinished"
    if not math.isfinite(when):
        return state if ranks else status(run)
    return f"{state}, last step {duration(max(0.0, now - when))} ago"


def _show_ranks(run: RunData, now: float) -> None:
    records = read_records(run.path)
    if rows := rank_table(newest_start(records), now):
        show(f"\nranks of {one_line(run.name)}")
        show(_aligned(rows))
    if (wrong := last_wrong(records, now)) is not None:
        show(f"{one_line(run.name)}: {one_line(wrong)}")


def _show_alarms(run: RunData) -> None:
    if rows := standing_alarms(run):
        show(f"\nalarms of {one_line(run.name)}")
        show(_aligned(rows))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns; a cell is one line of at most ``_WIDTH`` characters."""
    rows = [[one_line(cell[:_WIDTH]) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)

"""The report's figures in words: headline, validation per domain, and what differs between configs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from moetrain.report.columns import number
from moetrain.report.runs import RunData

Table = list[list[str]]  # the first row is the head, the first column names the rows
NOTHING = "-"


def status(run: RunData) -> str:
    """``finished``, ``stopped: <why>``, or that there is no summary (running, or killed)."""
    if not run.summary:
        return "unfinished: still running, or interrupted"
    if run.summary.get("finished", True):
        return "finished"
    return f"stopped: {run.summary.get('reason') or 'no reason recorded'}"


def fact(run: RunData, key: str) -> float:
    """A number from summary.json, else environment.json; NaN if neither has it."""
    value = number(run.summary.get(key))
    return value if math.isfinite(value) else number(run.environment.get(key))


def seconds(run: RunData) -> float:
    """Time spent training; without a summary, from the first to the last row."""
    if math.isfinite(value := fact(run, "seconds")):
        return value
    times = run.series("time")[1]
    return float(times[-1] - times[0]) if len(times) > 1 else math.nan


def speed(run: RunData) -> float:
    """Tokens per second over the whole run."""
    if math.isfinite(value := fact(run, "tokens_per_second")):
        return value
    values = run.series("tokens_per_second")[1]
    values = values[[math.isfinite(v) for v in values]] if len(values) else values
    return float(values.mean()) if len(values) else math.nan


def planned_steps(run: RunData) -> float:
    section = run.config().get("train")
    return number(section.get("steps")) if isinstance(section, dict) else math.nan


def headline(runs: Sequence[RunData]) -> Table:
    """One column per run. Lines without a number in any run are left out."""

    def steps(run: RunData) -> str:
        done, planned = run.last("step"), planned_steps(run)
        text = whole(done)
        return f"{text} of {whole(planned)}" if math.isfinite(planned) and planned != done else text

    lines: list[tuple[str, Callable[[RunData], str]]] = [
        ("Status", status),
        ("Validation bits per byte", lambda r: latest(r, "val/bits_per_byte", 4)),
        ("Validation loss (nats per token)", lambda r: latest(r, "val/loss", 4)),
        ("Validation perplexity", lambda r: latest(r, "val/perplexity", 2)),
        ("Training loss (last step)", lambda r: latest(r, "train/loss", 4)),
        ("Parameters", lambda r: whole(fact(r, "params_total"))),
        ("Active parameters per token", lambda r: whole(fact(r, "params_active"))),
        ("Forward FLOPs per token", lambda r: whole(fact(r, "flops_per_token"))),
        ("Steps", steps),
        ("Training tokens", lambda r: whole(r.last("tokens"))),
        ("Training time", lambda r: duration(seconds(r))),
        ("Tokens per second", lambda r: whole(speed(r))),
    ]
    body = [[name, *(text(run) for run in runs)] for name, text in lines]
    head = ["", *(run.name for run in runs)]
    return [head, *(row for row in body if any(cell != NOTHING for cell in row[1:]))]


def domain_table(runs: Sequence[RunData]) -> Table:
    """Final validation bits per byte of each domain; empty without domains."""
    domains = sorted({domain for run in runs for domain in run.domains})
    if not domains:
        return []
    rows = [[d, *(latest(run, f"val/{d}/bits_per_byte", 4) for run in runs)] for d in domains]
    return [["Validation bits per byte", *(run.name for run in runs)], *rows]


def alarm_table(runs: Sequence[RunData], limit: int = 50) -> Table:
    """What was raised, the oldest first, and when it was over; empty where nothing was."""
    rows = [row for run in runs for row in _alarm_rows(run, len(runs) > 1)]
    return _table_of_alarms(rows[:limit], len(rows) - limit)


def standing_alarms(run: RunData, limit: int = 16) -> Table:
    """What was raised, that which is not over first, of the rest the newest; empty where nothing was."""
    newest_first = _alarm_rows(run, named=False)[::-1]
    rows = sorted(newest_first, key=lambda row: row[-1] != NOTHING)
    return _table_of_alarms(rows[:limit], len(rows) - limit)


def _table_of_alarms(rows: Table, more: int) -> Table:
    head = ["Step", "Alarm", "Where", "What", "May help", "Over at step"]
    rest = [[f"... and {more} more", *("" for _ in head[1:])]] if more > 0 else []
    return [head, *rows, *rest] if rows else []


def _alarm_rows(run: RunData, named: bool) -> Table:
    rows: Table = []
    open_rows: dict[tuple[str, str], list[str]] = {}
    for alarm in run.alarms:
        step, name, layers = alarm.get("step"), str(alarm.get("alarm", "")), alarm.get("layers")
        for layer in layers if isinstance(layers, list) and layers else ["the run"]:
            key = name, str(layer)
            if alarm.get("raised") is True:
                where = str(layer) if layer == "the run" else f"layer {layer}"
                first = f"{run.name}: {step}" if named else str(step)
                what, helps = str(alarm.get("why", "")), str(alarm.get("suggestion") or NOTHING)
                open_rows[key] = [first, name, where, what, helps, NOTHING]
                rows.append(open_rows[key])
            elif key in open_rows:
                open_rows.pop(key)[-1] = str(step)
    return rows


def config_differences(runs: Sequence[RunData], limit: int = 60) -> Table:
    """The config keys whose values are not the same in all runs; empty if there is nothing to tell apart."""
    configs = [_flat(run.config()) for run in runs]
    keys = sorted({key for config in configs for key in config})
    rows = [[key, *(config.get(key, NOTHING) for config in configs)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if len(rows) > limit:
        rows = [*rows[:limit], [f"... and {len(rows) - limit} more", *("" for _ in runs)]]
    return [["Config key", *(run.name for run in runs)], *rows] if rows else []


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        flat: dict[str, str] = {}
        for key, item in value.items():
            flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: json.dumps(value, default=str)} if prefix else {}


def whole(value: float) -> str:
    """Digits in groups of three; large ones with a short form: ``22,600,000 (22.6 M)``."""
    if not math.isfinite(value):
        return NOTHING
    text = f"{value:,.0f}"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{text} ({value / size:.3g} {unit})"
    return text


def latest(run: RunData, key: str, digits: int) -> str:
    """The newest value of ``key``, ``nan`` and ``inf`` by name; ``-`` if the run has none."""
    values = run.series(key)[1]
    return f"{values[-1]:.{digits}f}" if len(values) else NOTHING


def duration(value: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if not math.isfinite(value):
        return NOTHING
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"

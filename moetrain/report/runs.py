"""Reading a run folder, whatever state it is in: torn lines, missing files and NaN give notes, not errors."""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import JsonValue

from moetrain.errors import UserError
from moetrain.files import MB, open_regular, parse_yaml, read_json
from moetrain.report.columns import Array, Columns, Loads, read_columns, read_loads
from moetrain.train.log.jsonl import read_lines

_SAMPLES, _SAMPLE = 1000, 1 << 16  # the newest, and bytes of each
_ALARMS = 1000  # rows, the newest
_MARKS = ("metrics.jsonl", "config.yaml", "environment.json", "checkpoints")


@dataclass(frozen=True)
class RunData:
    """One run folder's content; ``notes`` say what was missing or unreadable."""

    name: str
    path: Path
    columns: Columns
    loads: Loads | None
    summary: dict[str, Any]
    environment: dict[str, Any]
    config_text: str
    samples: list[tuple[str, str]]
    alarms: list[dict[str, Any]] = field(default_factory=list)  # rows of alarms.jsonl, the oldest first
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> tuple[Array, Array]:
        """Steps (rising, each once: the last row written wins) and the values of ``key``."""
        return self.columns.get(key, (np.zeros(0), np.zeros(0)))

    def last(self, key: str) -> float:
        """The newest value of ``key``; NaN if there is none."""
        values = self.series(key)[1]
        return float(values[-1]) if len(values) else math.nan

    def layers(self, name: str) -> list[int]:
        """The layers that have ``moe/<layer>/<name>``, rising."""
        pattern = re.compile(rf"moe/(\d{{1,9}})/{re.escape(name)}")
        return sorted(int(m.group(1)) for key in self.columns if (m := pattern.fullmatch(key)))

    @property
    def domains(self) -> list[str]:
        return sorted(
            m.group(1) for key in self.columns if (m := re.fullmatch(r"val/(.+)/bits_per_byte", key))
        )

    def config(self) -> dict[str, Any]:
        """The composed config as plain values; empty if it is missing or no YAML."""
        try:
            loaded = parse_yaml(self.config_text, "config.yaml")
        except UserError:
            return {}
        return loaded if isinstance(loaded, dict) else {}


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """All runs, each folder once, named by the shortest path endings that tell them apart.

    Raises UserError for a path that is no run folder.
    """
    unique = list(dict.fromkeys(path.resolve() for path in paths))
    return [read_run(path, name) for path, name in zip(unique, short_names(unique), strict=True)]


def read_run(path: Path, name: str | None = None) -> RunData:
    """Everything the report shows of one run folder. Raises UserError if ``path`` is none."""
    check_run_folder(path)
    notes: list[str] = []
    columns = read_columns(path / "metrics.jsonl", notes)
    if not columns and not notes:
        notes.append("metrics.jsonl holds no step yet")
    return RunData(
        name=name or path.resolve().name,
        path=path,
        columns=columns,
        loads=read_loads(path / "load.jsonl", notes),
        summary=_read_object(path / "summary.json", notes),  # there is none before the run's end
        environment=_read_object(path / "environment.json", notes),
        config_text=_read_text(path / "config.yaml", notes) or "",
        samples=_read_samples(path / "samples", notes),
        alarms=_read_alarms(path / "alarms.jsonl", notes),
        notes=notes,
    )


def check_run_folder(path: Path) -> None:
    """Raise UserError unless ``path`` is a folder that holds one of a run's files."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give a run folder, such as runs/NAME")
    if any((path / mark).exists() for mark in _MARKS):
        return
    inside = sorted(p.name for p in path.iterdir() if any((p / mark).exists() for mark in _MARKS))
    hint = f"; it holds the runs {', '.join(inside[:5])}: name one of them" if inside else ""
    raise UserError(f"{path} is not a run folder: it has no {', '.join(_MARKS[:2])}{hint}")


def short_names(paths: Sequence[Path]) -> list[str]:
    """As few trailing parts of each path as make the names differ."""
    for depth in range(1, max((len(p.parts) for p in paths), default=1) + 1):
        names = [os.path.join(*p.parts[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    return [str(p) for p in paths]


def _read_text(path: Path, notes: list[str], limit: int = MB) -> str | None:
    """The beginning of a text file, at most ``limit`` bytes."""
    if not path.exists():
        notes.append(f"{path.name} is missing")
        return None
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            data = file.read(limit + 1)
    except (UserError, OSError) as error:
        notes.append(f"{path.name} could not be read: {error}")
        return None
    if len(data) > limit:
        notes.append(f"{path.name} has more than {limit} bytes: its beginning is shown")
    return data[:limit].decode("utf-8", errors="replace")


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value: dict[str, Any] = read_json(path, dict[str, JsonValue], 4 * MB)
    except UserError:
        notes.append(f"{path.name} is not a JSON object")
        return {}
    return value


def _read_alarms(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The newest rows of the file, and before them what was raised earlier and is not over.

    Lines that hold no row are passed over.
    """
    if not path.exists():  # nothing was wrong
        return []
    rows, number = deque[dict[str, Any]](maxlen=_ALARMS), 0
    raised: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {}
    try:
        for number, row in enumerate((line.row for line in read_lines(path) if line.row is not None), 1):
            rows.append(row)
            layers = row.get("layers")
            for layer in layers if isinstance(layers, list) and layers else [None]:
                key = str(row.get("alarm")), str(layer)
                raised.pop(key, None)
                if row.get("raised") is True and len(raised) < _ALARMS:
                    raised[key] = number, {**row, "layers": [] if layer is None else [layer]}
    except UserError as error:
        notes.append(str(error))
        return []
    if number > _ALARMS:
        notes.append(f"{path.name} has {number:,} rows: the last {_ALARMS:,} and what is not over are shown")
    return [*(row for at, row in raised.values() if at <= number - _ALARMS), *rows]


def _read_samples(folder: Path, notes: list[str]) -> list[tuple[str, str]]:
    """The texts of ``samples/*.txt``, by the numbers in their names."""

    def order(path: Path) -> tuple[list[int], str]:
        return [int(n) for n in re.findall(r"\d+", path.stem)], path.name

    paths = sorted(folder.glob("*.txt"), key=order) if folder.is_dir() else []
    texts = [(path.name, _read_text(path, notes, _SAMPLE)) for path in paths[-_SAMPLES:]]
    return [(name, text) for name, text in texts if text is not None]

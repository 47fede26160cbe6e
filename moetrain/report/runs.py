"""Reading a run folder, whatever state it is in: torn lines, missing files and NaN give notes, not errors."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.errors import UserError

Array = NDArray[np.float64]
_MARKS = ("metrics.jsonl", "config.yaml", "environment.json", "checkpoints")


@dataclass(frozen=True)
class Loads:
    """Expert shares over time: ``share_PLE`` has P recorded steps, L MoE layers, E experts."""

    steps: Array
    layers: tuple[int, ...]
    share_PLE: Array

    @property
    def relative_PLE(self) -> Array:
        """Times the uniform share: 1 is perfect balance, 0 a dead expert."""
        relative_PLE: Array = self.share_PLE * self.share_PLE.shape[2]
        return relative_PLE


@dataclass(frozen=True)
class RunData:
    """One run folder's content; ``notes`` say what was missing or unreadable."""

    name: str
    path: Path
    rows: list[dict[str, Any]]
    loads: Loads | None
    summary: dict[str, Any]
    environment: dict[str, Any]
    config_text: str
    samples: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> tuple[Array, Array]:
        """Steps (rising, each once: the last row written wins) and the values of ``key``."""
        found = {number(r.get("step")): number(r[key]) for r in self.rows if key in r}
        steps = sorted(s for s in found if math.isfinite(s))
        return np.array(steps), np.array([found[s] for s in steps])

    def last(self, key: str) -> float:
        """The newest value of ``key``; NaN if there is none."""
        values = self.series(key)[1]
        return float(values[-1]) if len(values) else math.nan

    def layers(self, name: str) -> list[int]:
        """The layers that have ``moe/<layer>/<name>``, rising."""
        pattern = re.compile(rf"moe/(\d+)/{re.escape(name)}")
        keys = {key for row in self.rows for key in row}
        return sorted(int(m.group(1)) for key in keys if (m := pattern.fullmatch(key)))

    @property
    def domains(self) -> list[str]:
        keys = {key for row in self.rows for key in row}
        return sorted(m.group(1) for key in keys if (m := re.fullmatch(r"val/(.+)/bits_per_byte", key)))

    def config(self) -> dict[str, Any]:
        """The composed config as plain values; empty if it is missing or no YAML."""
        import yaml  # type: ignore[import-untyped]

        try:
            loaded = yaml.safe_load(self.config_text)
        except yaml.YAMLError:
            return {}
        return loaded if isinstance(loaded, dict) else {}


def number(value: Any) -> float:
    """``value`` as a float; NaN for what is none (null, text, true)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


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
    rows = list(_read_jsonl(path / "metrics.jsonl", notes))
    if not rows and not notes:
        notes.append("metrics.jsonl holds no step yet")
    return RunData(
        name=name or path.resolve().name,
        path=path,
        rows=rows,
        loads=_read_loads(path / "load.jsonl", notes),
        summary=_read_object(path / "summary.json", notes),  # there is none before the run's end
        environment=_read_object(path / "environment.json", notes),
        config_text=_read_text(path / "config.yaml", notes) or "",
        samples=_read_samples(path / "samples", notes),
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


def _read_text(path: Path, notes: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
    except OSError as error:
        notes.append(f"{path.name} could not be read: {error.strerror}")
    return None


def _read_jsonl(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    broken = 0
    for line in (_read_text(path, notes) or "").rstrip("\n").split("\n"):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            broken += 1
            continue
        if isinstance(row, dict):
            yield row
        else:
            broken += 1
    if broken:
        lines = "1 unreadable line was" if broken == 1 else f"{broken} unreadable lines were"
        notes.append(f"{path.name}: {lines} skipped")


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _read_text(path, notes) if path.exists() else None
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} is not a JSON object")
        return {}
    return value


def _read_loads(path: Path, notes: list[str]) -> Loads | None:
    if not path.exists():  # a dense model has none
        return None
    found: dict[float, Array] = {}
    layers: list[int] = []
    for row in _read_jsonl(path, notes):
        try:
            share_LE = np.array(row["load"], dtype=np.float64)
        except (KeyError, TypeError, ValueError):
            continue
        whole = share_LE.ndim == 2 and share_LE.size > 0 and bool(np.isfinite(share_LE).all())
        if whole and math.isfinite(step := number(row.get("step"))):
            found[step] = share_LE
            layers = row.get("layers") or layers
    if not found:
        return None
    shape = found[max(found)].shape  # rows of another model, if any, are left out
    steps = sorted(step for step, share_LE in found.items() if share_LE.shape == shape)
    names = tuple(layers) if len(layers) == shape[0] else tuple(range(shape[0]))
    return Loads(np.array(steps), names, np.stack([found[step] for step in steps]))


def _read_samples(folder: Path, notes: list[str]) -> list[tuple[str, str]]:
    """The texts of ``samples/*.txt``, by the numbers in their names."""

    def order(path: Path) -> tuple[list[int], str]:
        return [int(n) for n in re.findall(r"\d+", path.stem)], path.name

    paths = sorted(folder.glob("*.txt"), key=order) if folder.is_dir() else []
    texts = [(path.name, _read_text(path, notes)) for path in paths]
    return [(name, text) for name, text in texts if text is not None]
